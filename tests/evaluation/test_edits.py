"""``dedistill invert``: what it makes, what it does not make again, and what it refuses."""

import json
import shutil
from pathlib import Path

import pytest
from image_files import write_image
from PIL import Image
from written import marked

from dedistill.cli.main import main

FEW = ["--steps", "4", "--eta", "0", "1"]


@pytest.fixture
def photo(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_image(tmp_path / "photo.png", 40, 30, 0)
    return tmp_path / "photo.png"


def invert(*words, code: int = 0) -> None:
    assert main(["invert", *map(str, words)]) == code


def files(out: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in [*out.glob("*.safetensors"), *out.glob("images/*")]}


def test_the_same_command_makes_nothing_twice(photo, base_model, capsys):
    """Another prompt and another window cost no second inversion, a lost image only itself; a damaged state is made again."""
    out = Path("inversions/photo")
    invert(photo, "--model", base_model, "--prompt", "3 seven", *FEW)
    first = files(out)
    assert len(first) == 1 + 2 + 2 * 2
    invert(photo, "--model", base_model, "--prompt", "3 seven", *FEW)
    assert files(out) == first
    cells = json.loads((out / "inversion.json").read_text())["cells"]
    assert [(cell["prompt"], cell["eta"]) for cell in cells] == [(None, 0), (None, 1), ("3 seven", 0), ("3 seven", 1)]
    (out / cells[2]["file"]).unlink()
    capsys.readouterr()
    invert(photo, "--model", base_model, "--prompt", "3 seven", "1 two", *FEW)
    assert "3 images to make" in capsys.readouterr().err
    second = files(out)
    assert {name for name in first if second[name] != first[name]} == {
        Path(cells[2]["file"]).name,
        *(Path(json.loads((out / "inversion.json").read_text())[key]).name for key in ("source", "decoded")),
    }
    (state,) = out.glob("*.safetensors")
    state.write_bytes(b"x")
    invert(photo, "--model", base_model, "--stop", "0.5", *FEW)
    assert state.stat().st_size > 100 and len(files(out)) == len(second) + 2
    assert marked(out) == {"inversion"}


def test_an_image_that_is_held_to_the_end_comes_back(photo, base_model):
    """Of a model without a codec, to the level of 8 bits; the window tells how much."""
    invert(photo, "--model", base_model, "--stop", "1", *FEW)
    found = json.loads(Path("inversions/photo/inversion.json").read_text())
    free, held = (cell["psnr"] for cell in found["cells"])
    assert held == found["limit"] > free


def test_weights_of_a_run(adapter_recipe, tmp_path, photo):
    """A run by its folder, its recipe, and the base that it was trained on: other images of each weights."""
    assert main(["train", str(adapter_recipe)]) == 0
    ends = []
    for words in ([tmp_path / "dedistill"], [adapter_recipe], [adapter_recipe, "--weights", "base"]):
        invert(photo, "--model", *words, "--prompt", "3 seven", "--steps", "2", "--eta", "0.2", "--out", tmp_path / "out")
        ends.append(json.loads((tmp_path / "out/inversion.json").read_text())["cells"][1]["file"])
    assert ends[0] == ends[1] != ends[2]
    with Image.open(tmp_path / "out" / ends[0]) as image:
        assert image.size == (16, 8) and image.text["prompt"] == "3 seven"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.png", "--model", "M"], "'none.png': no such image"),
        (["bad.png", "--model", "M"], "bad.png': not an image of a known format"),
        (["photo.png", "--model", "M", "--eta", "1.5"], "--eta 1.5: 0 to 1 is needed"),
        (["photo.png", "--model", "M", "--eta", "-0.1"], "--eta -0.1: 0 to 1 is needed"),
        (["photo.png", "--model", "M", "--gamma", "2"], "--gamma 2: 0 to 1 is needed"),
        (["photo.png", "--model", "M", "--start", "0.5", "--stop", "0.2"], "start <= stop"),
        (["photo.png", "--model", "M", "--source", "a", "--null", "zeros"], "--null zeros: has no effect with --source"),
        (["photo.png", "--model", "M", "--weights", "ema"], "--weights ema: "),
        (["photo.png", "--model", "M", "--guider", "auto", "--prompt", "a"], "guider 'auto'"),
        (["photo.png", "--model", "nowhere"], "nowhere: no such file"),
        (["photo.png", "--model", "empty"], "config.json"),
    ],
)
def test_what_is_refused(photo, base_model, capsys, words, message):
    """In one line, and nothing is left behind but a folder that was begun by an image that could not be read."""
    Path("bad.png").write_bytes(b"no image")
    Path("empty").mkdir()
    before = sorted(Path().iterdir())
    assert main(["invert", *(str(base_model) if word == "M" else word for word in words), "--steps", "2"]) in (1, 2)
    said = capsys.readouterr().err
    assert message in said and "internal" not in said
    shutil.rmtree("inversions", ignore_errors=True)
    assert sorted(Path().iterdir()) == before
