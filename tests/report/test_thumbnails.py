"""Small copies in the grids: a page of many large images stays light, tiny images keep their pixels."""

import json
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images
from test_pages import Page, story_of, write_sweep

from dedistill.errors import UserError
from dedistill.report import sweep as sweep_gallery
from dedistill.report.story import write_story_page
from dedistill.report.sweep import write_sweep_page
from tests.faults.harness import full_disk_from

SIDE = 512


def photographs(count: int) -> list[Image.Image]:
    """Parts of two photographs at the size that models make."""
    generator, whole = np.random.default_rng(0), [Image.fromarray(image) for image in load_sample_images().images]
    found = []
    for i in range(count):
        side = int(generator.integers(300, 427))
        left, top = (int(generator.integers(n - side)) for n in whole[i % 2].size)
        part = whole[i % 2].crop((left, top, left + side, top + side))
        found.append(part.resize((SIDE, SIDE), Image.Resampling.LANCZOS))
    return found


@pytest.mark.parametrize("different", [6, pytest.param(25, marks=pytest.mark.slow)])
def test_200_images_of_512_pixels_are_under_5_mb(tmp_path, monkeypatch, different):
    """Page and small copies together, every one of the 200 counted, as if no two were alike; the large ones stay."""
    monkeypatch.setattr(sweep_gallery, "SHEET_SIDE", 32)  # sheets are not part of the page
    photos = photographs(different)
    for i, photo in enumerate(photos):
        photo.save(tmp_path / f"{i}.png", compress_level=1)
    prompts = [f"a photograph, number {i}, with a caption as long as those that models are given in earnest" for i in range(8)]
    index, cells = [], []
    for name in "abcde":
        for cfg in range(1, 6):
            cells.append({"candidate": name, "cfg": cfg, "skip": 0, "detail": 0.1})
            for prompt in prompts:
                entry = {"candidate": name, "cfg": cfg, "skip": 0, "prompt": prompt, "seed": 0}
                index.append({"file": f"{len(index) % len(photos)}.png", **entry})
    scores = {"title": "t", "settings": {}, "numbers": [{"key": "detail", "label": "detail"}], "cells": cells}
    (tmp_path / "index.json").write_text(json.dumps(index))
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    page = Page(write_sweep_page(tmp_path))
    small = [tmp_path / image["src"] for image in page.all("img", loading="lazy")]
    assert len(small) == 200 and len(set(small)) == len(photos)
    assert 1e6 < len(page.source.encode()) + sum(path.stat().st_size for path in small) < 5e6
    with Image.open(small[0]) as image:
        assert image.format == "WEBP" and image.size == (320, 320)
        sharp = photos[0].resize(image.size, Image.Resampling.LANCZOS)
        assert np.abs(np.asarray(image, float) - np.asarray(sharp, float)).mean() < 5  # of 255
    assert all(image["width"] == str(SIDE) for image in page.all("img", loading="lazy"))
    assert {a["href"] for a in page.all("a", class_="shot")} == {f"{i}.png" for i in range(len(photos))}


def test_tiny_images_are_shown_themselves(tmp_path):
    write_sweep(tmp_path, size=(32, 32), mode="RGB")
    page = Page(write_sweep_page(tmp_path))
    assert all(unquote(image["src"]).endswith(".png") for image in page.all("img", loading="lazy"))
    assert not (tmp_path / "thumbs").exists()


def test_small_copies_follow_their_images(tmp_path):
    """Made anew for an image that changed, dropped for one that is gone, left alone otherwise; two alike share one."""
    write_sweep(tmp_path, size=(128, 128), mode="RGB", prompts=["a", "b"])
    write_sweep_page(tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "thumbs").iterdir()}
    index = json.loads((tmp_path / "index.json").read_text())
    assert len(before) == len(index)
    (tmp_path / index[0]["file"]).write_bytes((tmp_path / index[1]["file"]).read_bytes())
    Image.new("RGB", (128, 128), "red").save(tmp_path / index[2]["file"])
    write_sweep_page(tmp_path)
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "thumbs").iterdir()}
    assert len(before.keys() - after.keys()) == 2 and len(after.keys() - before.keys()) == 1
    assert all(after[name] == before[name] for name in after.keys() & before.keys())


@pytest.mark.parametrize("damage", [lambda raw: b"", lambda raw: raw[:-200], lambda raw: bytes(len(raw)), lambda raw: b"{}"])
def test_a_small_copy_that_is_damaged_is_made_again(tmp_path, damage):
    """A killed page or a loss of power left it; its name is right all the same."""
    write_sweep(tmp_path, size=(128, 128), mode="RGB", prompts=["a", "b"])
    write_sweep_page(tmp_path)
    files = {path: path.read_bytes() for path in sorted((tmp_path / "thumbs").iterdir())}
    for path in list(files)[::2]:
        path.write_bytes(damage(files[path]))
    write_sweep_page(tmp_path)
    assert {path: path.read_bytes() for path in sorted((tmp_path / "thumbs").iterdir())} == files


@pytest.mark.parametrize("at", [1, 3, 6])
def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path, at):
    """Nothing of a page is ever seen half-written, neither text nor images."""
    write_sweep(tmp_path, size=(128, 128), mode="RGB", prompts=["a", "b"])
    before = {p: p.read_bytes() for p in (write_sweep_page(tmp_path), *(tmp_path / "sheets").iterdir())}
    scores = json.loads((tmp_path / "scores.json").read_text()) | {"title": "another"}
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    with full_disk_from(at), pytest.raises(UserError, match="No space left"):
        write_sweep_page(tmp_path)
    now = {p: p.read_bytes() for p in before}
    assert now[tmp_path / "index.html"] == before[tmp_path / "index.html"]
    for path in set(before) - {tmp_path / "index.html"}:
        with Image.open(path) as image:
            image.load()
    assert not list(tmp_path.rglob("*.tmp-*"))


def test_a_story_has_its_own_beside_the_page(tmp_path):
    """Its images lie in the folder of a sweep; its small copies do not."""
    story = story_of(tmp_path)
    large = Image.effect_noise((200, 200), 60)
    for file in {file for models in story["images"].values() for files in models.values() for file in files}:
        large.save(tmp_path / file.removeprefix("../"))
    page = Page(write_story_page(tmp_path / "story", story))
    sources = {image["src"] for image in page.all("img", loading="lazy")}
    assert len(sources) == 1 and (tmp_path / "story" / sources.pop()).parent == tmp_path / "story" / "thumbs"
    assert all(a["href"].startswith("../sweep/") for a in page.all("a", class_="shot"))


def test_transparency_survives_and_a_cut_image_is_named(tmp_path):
    write_sweep(tmp_path, size=(128, 128), mode="RGB", prompts=["a"])
    file = tmp_path / json.loads((tmp_path / "index.json").read_text())[0]["file"]
    half = Image.new("RGBA", (128, 128), (200, 30, 30, 255))
    half.paste((0, 0, 0, 0), (0, 0, 64, 128))
    half.save(file)
    page = Page(write_sweep_page(tmp_path))
    with Image.open(tmp_path / page.all("img", loading="lazy")[0]["src"]) as image:
        assert [image.getpixel(at)[3] for at in ((10, 60), (110, 60))] == [0, 255]
    cut = tmp_path / json.loads((tmp_path / "index.json").read_text())[1]["file"]
    cut.write_bytes(cut.read_bytes()[:2000])  # its size can still be read
    with pytest.raises(UserError, match=cut.name):
        write_sweep_page(tmp_path)
