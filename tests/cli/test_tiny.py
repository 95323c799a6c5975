"""A run without weights: the tiny model and sample images (test_rehearse.py rehearses on them)."""

import errno
from pathlib import Path

import pytest
from PIL import Image

from dedistill.cli import tiny
from dedistill.cli.main import main
from dedistill.models.registry import families, get_family

FEW = ["train.steps=4", "train.warmup=0", "snapshot.every=2", "validate.samples=4", "validate.every=4", "checkpoint.every=4"]
SETTINGS = [word for setting in FEW for word in ("--set", setting)]


FEWER = {"posthoc": ["--alpha", "0.9"], "sweep": ["--prompts", "2", "--steps", "2"]}
"""Averages and images, which take most of the time."""
SLOW = {"sd15"}
"""Another family takes the same way: sdxl."""


@pytest.mark.parametrize("family", [pytest.param(f, marks=pytest.mark.slow) if f in SLOW else f for f in families()])
def test_a_whole_run_on_a_tiny_model(family, tmp_path, monkeypatch, capsys):
    """The recipe on stdout trains; averages, sweep and export follow as stderr says."""
    monkeypatch.chdir(tmp_path)
    images = ["--images", "data/tiny"] if family != "pixel_flux" else []
    assert main(["tiny", family, "models/tiny", *images]) == 0
    said = capsys.readouterr()
    assert "[data]" not in said.out and "WARNING" not in said.err
    Path("tiny.toml").write_text(said.out)
    if images:
        assert main(["scan", "data/tiny"]) == 0 and "split_lines" not in "".join(capsys.readouterr())
    assert main(["train", "tiny.toml", *SETTINGS]) == 0
    after = [line.split() for line in said.err.splitlines() if line.startswith("  dedistill")]
    assert after[0] == ["dedistill", "train", "tiny.toml"] and len(after) == 4
    for words in after[1:]:
        assert main([*words[1:], *FEWER.get(words[1], [])]) == 0, words
    assert Path("exports/tiny.safetensors").exists() and Path("runs/tiny/sweep/index.html").exists()
    assert Path("cache/tiny").exists() == bool(images)


def test_a_folder_that_holds_something_is_refused(tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").write_text("mine")
    (tmp_path / "empty").mkdir()
    assert main(["tiny", "pixel_flux", str(tmp_path / "full")]) == 2
    assert main(["tiny", "pixel_flux", str(tmp_path / "new"), "--images", str(tmp_path / "full")]) == 2
    assert main(["tiny", "pixel_flux", str(tmp_path / "full/x")]) == 2
    assert capsys.readouterr().err.count("is not an empty folder") == 3
    assert [p.name for p in sorted(tmp_path.rglob("*"))] == ["empty", "full", "x"]
    assert main(["tiny", "pixel_flux", str(tmp_path / "empty")]) == 0


@pytest.mark.parametrize("own", ["set", "file", "there"])
def test_places_that_the_user_names_are_looked_at(own, tmp_path, monkeypatch, capsys):
    """A misspelt folder, or one without an image, stays an error."""
    monkeypatch.chdir(tmp_path)
    arguments = ["dedistill:flux_lora"]
    if own == "set":
        arguments += ["--set", "data.sets.0.path='data/pcitures'"]
    elif own == "file":
        Path("my.toml").write_text('extends = "dedistill:flux_lora"\n[[data.sets]]\npath = "data/pcitures"\n')
        arguments = ["my.toml"]
    else:
        Path("data/subject").mkdir(parents=True)
    assert main(["rehearse", *arguments]) != 0
    said = capsys.readouterr().err
    assert "stage 'your images and captions'" in said and "sample images" not in said


def test_sample_images_are_captioned(tmp_path):
    from dedistill.cli.tiny import write_samples

    assert write_samples(tmp_path, 64, 48) == len(list(tmp_path.glob("*.jpg"))) == len(list(tmp_path.glob("*.txt")))
    with Image.open(tmp_path / "sample0.jpg") as image:
        assert image.size == (64, 48) and len({*image.resize((8, 6)).getdata()}) > 8


@pytest.mark.parametrize("part", ["model", "images"])
def test_half_of_it_is_none(part, tmp_path, monkeypatch, capsys):
    """A disk that is full before the end leaves nothing in the way of the same command."""
    words = ["tiny", "pixel_flux", str(tmp_path / "model"), "--images", str(tmp_path / "images")]
    place, name = {"model": (type(get_family("pixel_flux", "x")), "write_tiny"), "images": (tiny, "write_samples")}[part]
    write = getattr(place, name)

    def cut(*arguments, **options):
        write(*arguments, **options)
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / part))

    with monkeypatch.context() as patch:
        patch.setattr(place, name, cut)
        assert main(words) == 1 and "No space left" in capsys.readouterr().err
    assert not (tmp_path / part).exists()
    if part == "model":
        assert main(words) == 0
