"""Every command, for a family with another kind of network than FLUX, and for one that another package brings."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from ranks import forked
from safetensors import safe_open
from safetensors.torch import load_file

from dedistill.adapters.files import read_tensors
from dedistill.cli.main import main
from dedistill.models import registry
from dedistill.release.headers import read_recipe

PACKAGE = Path(__file__).parents[2] / "dedistill"
FEW = ["train.steps=6", "train.warmup=0", "snapshot.every=2", "validate.samples=4", "validate.every=3", "checkpoint.every=3"]
SETTINGS = [word for setting in FEW for word in ("--set", setting)]
SCORED = ["--samples", "16", "--set", "train.batch=16"]  # as many images are made at once
PATHS = ["--cfg", "1", "3", "--few", "1", "2", "--steps", "4"]
MORE = '[meters]\nevery = 3\nsamples = 2\nsteps = 2\n[preview]\nevery = 3\nprompts = ["a red circle"]\n'


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A finished run of the example's recipe, from its tiny model and sample images: tiny.toml, runs/tiny, models/tiny."""
    here, before = tmp_path_factory.mktemp("example"), Path.cwd()
    os.chdir(here)
    try:
        assert main(["tiny", "example", "models/tiny", "--images", "data/tiny"]) == 0
        recipe = 'extends = "dedistill:example"\n[model]\npath = "models/tiny"\n[[data.sets]]\npath = "data/tiny"\n'
        Path("tiny.toml").write_text(recipe + MORE)
        Path("prompts.txt").write_text("".join(f"{n} red circles\n" for n in range(16)))
        assert main(["train", "tiny.toml", *SETTINGS]) == 0
    finally:
        os.chdir(before)
    return here


@pytest.fixture
def there(folder, monkeypatch, capsys) -> Path:
    monkeypatch.chdir(folder)
    capsys.readouterr()
    return folder


def header(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as f:
        return f.metadata()


@pytest.fixture(scope="module")
def average(folder) -> Path:
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert main(["posthoc", "runs/tiny", "--alpha", "0.5"]) == 0
    finally:
        os.chdir(before)
    (file,) = (folder / "runs/tiny/posthoc").glob("*0.5.safetensors")
    return file


@pytest.fixture(scope="module")
def merged(folder, average) -> Path:
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert main(["merge", "tiny.toml", "--weights", str(average), "--out", "models/merged", *SETTINGS]) == 0
    finally:
        os.chdir(before)
    return folder / "models/merged"


def test_training_learns_and_goes_on_as_it_was(there):
    """Through the cache of images and of both texts; a run that was cut off ends with the same bytes."""
    rows = [json.loads(line) for line in Path("runs/tiny/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6] and all(row["applied"] for row in rows)
    assert rows[-1]["val_loss"] > 0 and rows[-1]["guidance_gap"] >= 0 and rows[-1]["straightness"] >= 0
    assert (there / "runs/tiny/previews/step-00000006.png").exists()
    text = load_file(next(Path("cache/tiny/text").glob("*.safetensors")))
    assert {name.partition(".")[2] for name in text} == {"embeds", "mask", "embeds.1", "mask.1"}
    last = Path("runs/tiny/checkpoints/step-00000006")
    before = read_tensors(last / "trainable.safetensors")[0]
    shutil.rmtree(last)
    assert main(["train", "tiny.toml", *SETTINGS]) == 0
    after = read_tensors(last / "trainable.safetensors")[0]
    assert before.keys() == after.keys() and all((before[name] == after[name]).all() for name in before)


@pytest.mark.parametrize(
    "words",
    [
        ["rehearse", "tiny.toml", *SETTINGS],
        ["plan", "tiny.toml", *SETTINGS],
        ["prepare", "tiny.toml", "--check", *SETTINGS],
        ["scan", "data/tiny", "--out", "scan"],
        ["influence", "tiny.toml", "--budget", "20K", "--prompts", "2", "--sigmas", "2", "--out", "influence", *SETTINGS],
        ["sweep", "tiny.toml", "--cfg", "1", "3", "--prompts", "2", "--steps", "4", "--out", "sweep", *SETTINGS],
        ["measure", "tiny.toml", *PATHS, *SCORED, "--prompts", "4", "--out", "measured", *SETTINGS],
        [
            *["evaluate", "tiny.toml", "--cfg", "1", "3", "--steps", "4", "--prompts", "prompts.txt", *SCORED],
            *["--candidates", "base", "last", "--out", "evaluated", *SETTINGS],
        ],
        ["report", "runs/tiny"],
        ["invert", "data/tiny/sample0.jpg", "--model", "runs/tiny", "--prompt", "a square", "--steps", "4"],
        ["invert", "data/tiny/sample1.jpg", "--model", "models/tiny", "--eta", "0.5", "--fast", "--steps", "4"],
        ["pairs", "tiny.toml", "--out", "pairs", "--count", "4", "--steps", "2", "--points", "2", *SETTINGS],
    ],
    ids=lambda words: words[0],
)
def test_every_command_ends_well(there, average, words, capsys):
    code = main(words)
    assert code == 0, capsys.readouterr().err


def test_influence_has_one_stream(there):
    assert main(["influence", "tiny.toml", "--budget", "9K", "--prompts", "2", "--sigmas", "2", "--out", "one", *SETTINGS]) == 0
    blocks = json.loads(Path("one/influence.json").read_text())["blocks"]
    assert [block["name"] for block in blocks] == ["blocks.0", "blocks.1"]
    assert all(min(block["image"]) > 0 and "text" not in block for block in blocks)


@pytest.mark.parametrize("format", ["diffusers", "single", "int8"])
def test_a_merged_model_is_released_as_what_it_is(there, merged, format, tmp_path):
    out = tmp_path / "my-model"
    assert main(["export", str(merged), "--format", format, "--out", str(out), "--base", "dedistill/example-small"]) == 0
    card = (out / "README.md").read_text()
    assert "license: cc0-1.0" in card and "base_model: dedistill/example-small" in card
    assert not re.search("flux|T5|black-forest|schnell|ComfyUI", card, re.IGNORECASE)
    for file in out.rglob("*.json"):
        assert "flux" not in file.read_text().lower(), file
    if format == "single":
        told = header(out / "my-model.safetensors")
        assert told["modelspec.architecture"] == "dedistill-example" and told["modelspec.prediction_type"] == "epsilon"
        assert "flux" not in json.dumps(told).lower()
        assert load_file(out / "my-model.safetensors").keys() == load_file(next((merged / "unet").glob("*.safetensors"))).keys()
    else:
        assert (out / "unet" / "config.json").exists() and not (out / "transformer").exists()


def test_forms_that_do_not_apply_say_so(there, merged, average, tmp_path, capsys):
    assert main(["export", str(merged), "--format", "bfl", "--out", str(tmp_path / "a")]) == 2
    assert "'bfl' is not for example" in capsys.readouterr().err and not (tmp_path / "a").exists()
    for format in ("kohya", "peft"):
        file = tmp_path / f"{format}.safetensors"
        assert main(["export", str(average), "--format", format, "--model", "models/tiny", "--out", str(file)]) == 2
        assert not file.exists()
    assert "LoRA only" in capsys.readouterr().err


def test_adapters_are_released_and_checked(there, average, tmp_path, capsys):
    for format, begins in (("lycoris", "lycoris_blocks_0_to_q."), ("transformer", "unet.blocks.0.to_q.")):
        file = tmp_path / format / "mine.safetensors"
        assert main(["export", str(average), "--format", format, "--model", "models/tiny", "--out", str(file)]) == 0
        assert any(name.startswith(begins) for name in load_file(file))
        told = header(file)
        assert (
            told["modelspec.architecture"] == "dedistill-example/lora" and told["ss_base_model_version"] == "dedistill-example"
        )
        assert read_recipe(told["dedistill.recipe"])["model"]["family"] == "example"
        assert "flux" not in json.dumps(told).lower()
        capsys.readouterr()
        assert main(["check", str(file), "--model", "models/tiny"]) == 0
        said = capsys.readouterr().out
        assert "load_lokr" in said and "ComfyUI" not in said


def test_a_merged_model_is_trained_on(there, merged):
    others = [f"{table}.every=2" for table in ("snapshot", "validate", "meters", "preview", "checkpoint")]
    settings = [f"model.path='{merged}'", "run.out=runs/again", "train.steps=2", "train.warmup=0", *others]
    assert main(["train", "tiny.toml", *(word for setting in settings for word in ("--set", setting))]) == 0
    facts = json.loads((merged / "dedistill.json").read_text())
    assert facts["family"] == "example" and len(facts["merges"]) == 1


def with_package(folder: Path, lines: list[list[str]]) -> list[int]:
    """Exit codes of commands in ``folder``, where its "site" is one of the places of packages."""
    sys.path.insert(0, str(folder / "site"))
    registry._places.cache_clear()
    os.chdir(folder)
    return [main(line) for line in lines]


def test_a_family_of_another_package(tmp_path):
    """Found by its entry point; nothing of this package is changed for it."""
    own = tmp_path / "site" / "other_family"
    shutil.copytree(PACKAGE / "models" / "example", own, ignore=shutil.ignore_patterns("__pycache__"))
    for file in own.glob("*.py"):
        text = file.read_text().replace("dedistill.models.example", "other_family")
        file.write_text(text.replace('name="example"', 'name="other"').replace("ExampleNet", "OtherNet"))
    about = tmp_path / "site" / "other_family-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: other-family\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[dedistill.families]\nother = other_family:SPEC\n")
    recipe = 'extends = "dedistill:example"\n[model]\nfamily = "other"\npath = "models/tiny"\n[[data.sets]]\npath = "data"\n'
    (tmp_path / "mine.toml").write_text(recipe)
    lines = [
        ["tiny", "other", "models/tiny", "--images", "data"],
        ["train", "mine.toml", *SETTINGS],
        ["merge", "mine.toml", "--weights", "runs/mine/snapshots/step-00000006.safetensors", "--out", "models/out", *SETTINGS],
        ["export", "models/out", "--format", "diffusers", "--out", "released"],
    ]
    assert forked(with_package, tmp_path, lines) == [0] * len(lines)
    assert json.loads((tmp_path / "released/unet/config.json").read_text())["_class_name"] == "OtherNet"
    assert 'family = "other"' in (tmp_path / "released/README.md").read_text()
