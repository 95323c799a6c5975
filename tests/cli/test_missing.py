"""Models and data that are not where a recipe says: told at once, without torch and the network, with the way to get them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dedistill.cli.main import main
from dedistill.models.flux import SPEC
from dedistill.models.places import locate
from dedistill.models.registry import looks_local

CHILD = 'extends = "dedistill:{base}"\n\n[model]\npath = "{path}"\n'
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


STARTS = ("error: ", "a start would refuse: ")
"""Of what a command refuses, and of what a plan tells."""


def errors_of(capsys, *words: str) -> list[str]:
    """Lines of the error that a command must end with."""
    assert main([*words]) == 2
    found = [line.partition(start) for line in capsys.readouterr().err.splitlines() for start in STARTS]
    assert any(start for _, start, _ in found)
    return [line for before, start, line in found if start and not before]


GATED = " (it is gated: accept its terms on huggingface.co and run hf auth login first)"
DOWNLOAD = "folder; get it with: hf download"
SCHNELL = "hf download black-forest-labs/FLUX.1-schnell --local-dir"
PLACES = [
    ("flux_schnell_24gb", "models/FLUX.1-schnell", f"folder; get it with: {SCHNELL} models/FLUX.1-schnell{GATED}"),
    ("flux_schnell_24gb", "./weights/flux.1-schnell", f"folder; get it with: {SCHNELL} ./weights/flux.1-schnell{GATED}"),
    ("flux_schnell", "/nowhere/mine", f"folder; get it with: {SCHNELL} /nowhere/mine{GATED}"),
    ("flux_schnell", "mine", f"folder; get it with: {SCHNELL} mine{GATED}"),
    ("flux_schnell", "here/FLUX.1-dev", f"{DOWNLOAD} black-forest-labs/FLUX.1-dev --local-dir here/FLUX.1-dev"),
    ("flux_lora", "models/LibreFLUX", f"{DOWNLOAD} jimmycarter/LibreFLUX --local-dir models/LibreFLUX"),
    ("flux_lora", "flux1-dev.safetensors", "file; get it with: hf download black-forest-labs/FLUX.1-dev --local-dir models/"),
    ("flex1_alpha", "models/Flex.1-alpha", f"{DOWNLOAD} ostris/Flex.1-alpha --local-dir models/Flex.1-alpha"),
    ("flux_tiny", "models/tiny", "folder; get it with: dedistill tiny flux models/tiny --images data/tiny"),
    ("example", "models/other", "folder"),
    ("digits/dedistill", "runs/digits/student/model", "folder; make it with: dedistill train dedistill:digits/student"),
]  # fmt: skip


@pytest.mark.parametrize(("base", "path", "says"), PLACES)
def test_a_model_that_is_not_there(home, capsys, base, path, says):
    (home / "here").mkdir()  # the first part of a path that exists makes it a place
    (home / "my.toml").write_text(CHILD.format(base=base, path=path))
    for words in (["train", "my.toml"], ["plan", "my.toml", "--no-forecast"]):
        first = errors_of(capsys, *words)[0]
        assert first.startswith(f"my.toml:4: model.path: {path}: no such {says}"), first
    assert sorted(p.name for p in home.iterdir()) == ["here", "my.toml"]


def test_it_takes_no_second_and_no_torch(home):
    (home / "my.toml").write_text(CHILD.format(base="flux_schnell_24gb", path="models/FLUX.1-schnell"))
    code = """import sys; from dedistill.cli.main import main; start = time.process_time()
code = main(["train", "my.toml"])
print(json.dumps([code, time.process_time() - start, "torch" in sys.modules, "huggingface_hub" in sys.modules]))"""
    done = subprocess.run(
        [sys.executable, "-c", f"import json, time; {code}"],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    code, seconds, *heavy = json.loads(done.stdout)
    assert code == 2 and seconds < 1 and heavy == [False, False]


def test_all_that_is_missing_is_told_at_once(home, capsys):
    (home / "my.toml").write_text(CHILD.format(base="flux_schnell", path="models/FLUX.1-schnell"))
    settings = ["--set", "model.components=./parts", "--set", "data.sets=[{path='data/a'}, {path='data/b.parquet'}]"]
    starts = ("my.toml:4: model.path", "--set: model.components", "--set: data.sets.0.path", "--set: data.sets.1.path")
    for words in (["train"], ["prepare"], ["prepare", "--check"], ["plan", "--no-forecast"]):
        found = errors_of(capsys, *words, "my.toml", *settings)
        assert len(found) == 4 and all(line.startswith(start) for line, start in zip(found, starts)), found
        assert found[3].endswith("data/b.parquet: no such file")
    assert [p.name for p in home.iterdir()] == ["my.toml"]


@pytest.mark.slow  # cli/test_rehearse.py has one of a model with a known name
def test_a_rehearsal_needs_no_model_and_says_that_the_run_will(home, capsys, photos):
    settings = ["--set", "model.path=models/none", "--set", f"data.sets.0.path='{photos}'", "--set", "data.held_out=0.4"]
    code = main(["rehearse", "dedistill:flux_tiny", *settings])
    lines = capsys.readouterr().err.splitlines()
    assert code == 0 and lines[-1] == "NOT THERE YET: --set: model.path: models/none: no such folder", lines


@pytest.mark.parametrize(
    ("path", "local"),
    [
        ("black-forest-labs/FLUX.1-schnell", False),
        ("someone/model.v2", False),
        ("models/x", True),
        ("data/x", True),
        ("./x", True),
        ("../x/y", True),
        ("/x/y", True),
        ("x", True),
        ("a/b/c", True),
        ("someone/x.safetensors", True),
        ("there/x", True),
    ],
)
def test_what_is_meant_as_a_place(home, path, local):
    (home / "there").mkdir()
    assert looks_local(path) == local


@pytest.mark.parametrize("path", ["models/FLUX.1-schnell", "a/b/c", "x.safetensors"])
def test_who_loads_it_never_asks_the_network_for_a_place(path):
    with pytest.raises(Exception, match=rf"model\.path: {path}: no such file or folder"):
        locate(SPEC, path, "a" * 40, None)
