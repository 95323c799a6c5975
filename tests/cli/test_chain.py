"""A chain runs its stages in order, goes on after a stop, and is refused where it says what cannot be."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dedistill.cli.main import main
from dedistill.recipe.chain import load_chain
from dedistill.recipe.shipped import FOLDER

SHORT = 'extends = "dedistill:digits/{0}"\n[run]\nout = "out/{0}"\n'
CHAIN = """
out = "out"
[[stages]]
name = "teacher"
command = "train"
recipe = "teacher"
scaled = ["train.steps", "train.warmup", "checkpoint.every", "validate.every"]
[[stages]]
name = "pairs"
command = "pairs"
recipe = "teacher"
options = ["--out", "out/pairs", "--count", "80", "--steps", "4"]
scaled = ["--count", "train.steps", "train.warmup", "checkpoint.every", "validate.every"]
"""


@pytest.fixture
def chain(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "teacher.toml").write_text(SHORT.format("teacher"))
    (tmp_path / "mine" / "chain.toml").write_text(CHAIN)
    return tmp_path / "mine" / "chain.toml"


def dedistill(*words: str, **more) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "dedistill", *words], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **more
    )


def test_a_scale_multiplies_what_the_chain_says_and_leaves_the_rest(chain, capsys):
    assert main(["chain", "mine", "--dry-run", "--scale", "0.05"]) == 0
    train, pairs = capsys.readouterr().out.splitlines()
    steps = json.loads(subprocess.check_output([sys.executable, "-c", STEPS], text=True))
    assert f"--set train.steps={round(steps * 0.05)}" in train and train.startswith("dedistill train mine/teacher.toml")
    assert "--count 4 " in pairs and "--steps 4" in pairs


STEPS = "from dedistill.recipe import load_recipe as r; print(r('dedistill:digits/teacher').train.steps)"


@pytest.mark.long
def test_a_stopped_chain_goes_on_and_only_one_works_in_a_folder(chain):
    words = ("chain", "mine", "--scale", "0.04")
    first = dedistill(*words)
    metrics = Path("out/teacher/metrics.jsonl")
    while first.poll() is None and not metrics.exists():
        time.sleep(0.05)
    second = dedistill(*words)
    assert second.wait() == 1 and "another process" in second.stderr.read()
    os.kill(first.pid, signal.SIGTERM)
    assert first.wait() == 75
    said = first.stderr.read()
    assert said.splitlines()[-1] == "error: stopped; continue with: dedistill chain mine --scale 0.04"
    again = dedistill(*words)
    assert again.wait() == 0, again.stderr.read()
    assert json.loads(Path("out/pairs/pairs.json").read_text())["count"] == 3
    assert len(json.loads(Path("out/chain.json").read_text())["stages"]) == 2


@pytest.mark.parametrize(
    "change, wanted",
    [
        (('command = "train"', 'command = "rm"'), "chain.toml:5: stages.0.command"),
        (('scaled = ["--count", ', 'scaled = ["--counts", '), "'--counts'"),
        (('"--count", "80"', '"--count", "many"'), "'--count'"),
        (('"train.steps", "train.warmup", "checkpoint.every", "validate.every"]\n[[', '"train.stepz"]\n[['), "'train.stepz'"),
        (('name = "pairs"', 'name = "teacher"'), "two stages are called 'teacher'"),
        (('name = "pairs"', 'name = "pairs"\nrecipes = "x"'), "chain.toml:10: stages.1.recipes"),
        (('out = "out"', ""), "chain.toml: out"),
        (("[[stages]]", "[[stages]"), "chain.toml: cannot be read"),
    ],
)
def test_a_chain_that_cannot_be_is_refused_before_anything_runs(chain, capsys, change, wanted):
    text = chain.read_text()
    assert change[0] in text
    chain.write_text(text.replace(*change, 1))
    assert main(["chain", "mine"]) == 2
    assert wanted in capsys.readouterr().err
    assert not Path("out").exists()


def test_chains_that_come_with_the_package_name_recipes_that_are_there():
    for file in FOLDER.rglob("chain.toml"):
        chain = load_chain(f"dedistill:{file.parent.relative_to(FOLDER)}")
        assert all(len(chain.words(stage, 0.5)) > 1 for stage in chain.stages)
