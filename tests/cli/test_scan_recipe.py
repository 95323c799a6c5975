"""A scan of a recipe and its rehearsal count as training will, and name the key that takes what is left out."""

import json
import shutil

import pytest
from image_files import write_image
from PIL import Image

from dedistill.cli.main import main
from dedistill.data.images.buckets import crops_of, needed_upscale
from dedistill.data.images.decode import NO_IMAGE
from dedistill.data.images.index import Sample
from dedistill.data.images.types import NOWHERE
from dedistill.data.usable import by_headers, look
from dedistill.recipe import load_recipe


@pytest.fixture
def mixed(own):
    """Twelve usable images, six that are too small (four of them by less than half), one without a caption, one broken."""
    recipe, folder = own
    for i, side in enumerate((40, 41, 42, 43, 10, 12)):
        write_image(folder / f"a{i}.png", side, side, 70 + i)
        (folder / f"a{i}.txt").write_text(f"small {i}")
    write_image(folder / "bare.png", 100, 100, 80)
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "broken.txt").write_text("broken")
    return recipe, folder


def test_scan_counts_as_training_will(mixed, capsys):
    recipe, _ = mixed
    assert main(["scan", str(recipe), "--out", str(recipe.parent / "scan")]) == 0
    said = capsys.readouterr()
    assert "used: 12 images, 2 of them held out; 8 left out" in said.out
    assert "left out: 6 of 20 images are too small; data.max_upscale = 2 would take 4 of them" in said.out
    assert "left out: 1 without a caption; training ends with an error for them; data.missing_captions = 'empty'" in said.out
    assert "left out: 1 that cannot be used" in said.out and "buckets at 64" in said.out and "buckets at 512" not in said.out
    facts = json.loads((recipe.parent / "scan/scan.json").read_text())
    assert facts["sources"][0]["images"] == 12 and facts["sources"][0]["left_out"] == 8
    assert "data.max_upscale = 2 would take 4 of them" in (recipe.parent / "scan/index.html").read_text()
    wanted = ["data.max_upscale=2", "data.missing_captions=empty"]
    usable = look(load_recipe(recipe, wanted), lambda line: None)
    assert len(usable.images) == 12 + 4 + 1
    assert main(["scan", str(recipe), "--set", wanted[0], "--set", wanted[1]]) == 0
    assert f"used: {len(usable.images)} images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["photos", "images.toml"], "'images.toml' is a recipe: give it alone"),
        (["images.toml", "--fields", "x"], "stand in the recipe"),
        (["dedistill:digits/teacher"], "'digits' has no images of your own"),
        (["gone.toml"], "no such file"),
    ],
)
def test_what_a_scan_of_a_recipe_is_not_for(own, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(own[0].parent)
    try:
        assert main(["scan", *arguments]) in (1, 2)
    except SystemExit as e:
        assert e.code == 2
    assert message in capsys.readouterr().err


def test_headers_tell_what_a_look_tells(mixed, tmp_path):
    """Also of images in a tar shard, turned by EXIF, or in a table."""
    recipe, folder = mixed
    assert by_headers(load_recipe(recipe)) == (
        "20 images by their headers, 12 of them usable; 1 left out, e.g. broken.png: "
        f"{NO_IMAGE}; "
        "1 without a caption (data.missing_captions = 'empty' would take them); "
        "6 of 20 images are too small; data.max_upscale = 2 would take 4 of them"
    )
    for name in ("bare.png", "broken.png", "broken.txt"):
        (folder / name).unlink()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 90)).save(folder / "turned.jpg", exif=exif)
    (folder / "turned.txt").write_text("turned")
    import tarfile

    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for file in sorted(folder.iterdir()):
            tar.add(file, file.name)
    usable = look(load_recipe(recipe), lambda line: None)
    said = by_headers(load_recipe(recipe))
    assert said.startswith(f"19 images by their headers, {len(usable.images)} of them usable; 7 of 19 images are too small")
    assert by_headers(load_recipe(recipe, [f"data.sets.0.path={tmp_path}/s.tar"])) == said


@pytest.mark.parametrize("mode", ["aspect", "square", "random_aspect"])
def test_the_needed_upscale_is_the_least_that_gives_crops(mode):
    for width, height in ((40, 40), (50, 31), (200, 20), (63, 64), (64, 64), (17, 300)):
        sample = Sample("x", (), width, height, f"{width}", 0, NOWHERE)
        needed = needed_upscale(sample, resolutions=[64, 96], modes=[mode])
        options = {"resolutions": [64, 96], "modes": [mode], "per_image": 1, "seed": 0}
        if needed < 100:
            assert crops_of(sample, max_upscale=needed * 1.0001, **options)
        assert not crops_of(sample, max_upscale=min(needed, 1000) * 0.9999, **options)


def test_a_rehearsal_counts_all_and_hints_of_nothing_in_samples(mixed, capsys, monkeypatch):
    """The first eight of this folder are of every kind; what is said of the set is of all."""
    recipe, folder = mixed
    (folder / "bare.png").unlink()
    assert main(["rehearse", str(recipe), "--set", "train.steps=4"]) == 0
    said = capsys.readouterr().err
    assert (
        "19 images by their headers, 12 of them usable; 1 left out, e.g. broken.png: " in said
        and "6 of 19 images are too small" in said
    )
    assert "data.max_upscale = 2 would take 4 of them" in said and "the first 12 images of them looked at whole" in said
    shutil.rmtree(folder)
