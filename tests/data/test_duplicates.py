"""Near-duplicates are found whatever was done to an image, strangers are not; a split takes them whole, in any order."""

import hashlib
import io
import random
import time
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from PIL import Image, ImageEnhance
from scipy.sparse.csgraph import connected_components

from dedistill.data.encode import open_data
from dedistill.data.images.duplicates import linked, near_duplicates, near_pairs
from dedistill.data.images.index import Sample
from dedistill.data.images.likeness import MIRROR, Likeness, likeness
from dedistill.data.images.types import NOWHERE
from dedistill.data.split import CroppedImage, split
from dedistill.data.usable import hints, look, near_words
from dedistill.recipe import load_recipe


@cache
def scene(seed: int, aside: float = 0.0, side: int = 360) -> Image.Image:
    """A textured ground with shaded things before it; from ``aside``, near ones are shifted by more pixels than far ones."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, : side + 40].astype(float)
    ground = np.zeros((side, side + 40, 3))
    for octave in (4, 9, 20, 45):
        coarse = Image.fromarray(rng.integers(0, 255, (octave, octave, 3), dtype=np.uint8))
        ground += np.asarray(coarse.resize((side + 40, side), Image.Resampling.BICUBIC)) / octave**0.5
    ground *= 200 / ground.max()
    out = ground[:, 20 : side + 20].copy()
    y, x = y[:, :side], x[:, :side]
    for depth in range(12):
        at, size = rng.random(2) * side, 15 + 45 * rng.random(2)
        colour, wave = 255 * rng.random(3), rng.random(2) / 3
        inside = ((x - at[0] - aside * depth) / size[0]) ** 2 + ((y - at[1]) / size[1]) ** 2 < 1
        shade = 0.7 + 0.3 * np.sin(wave[0] * (x - aside * depth) + wave[1] * y)
        out[inside] = (colour * shade[..., None])[inside]
    return Image.fromarray(out.clip(0, 255).astype(np.uint8))


@cache
def likeness_of_scene(seed: int) -> Likeness:
    return likeness(scene(seed))


def compressed(image: Image.Image, kind: str = "JPEG", quality: int = 40) -> Image.Image:
    out = io.BytesIO()
    image.save(out, kind, quality=quality)
    return Image.open(out).convert("RGB")


CHANGED = {
    "compressed": compressed,
    "other format, smaller": lambda i: compressed(i.resize((150, 150)), "WEBP", 60),
    "another shape": lambda i: i.resize((400, 330)),
    "mirrored": lambda i: i.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "brighter": lambda i: ImageEnhance.Brightness(i).enhance(1.2),
    "cropped": lambda i: i.crop((0, 30, 320, 350)),
    "cropped to three quarters": lambda i: i.crop((70, 20, 340, 290)),
    "cropped, mirrored, compressed": lambda i: compressed(i.crop((40, 0, 340, 300)).transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
    "cropped to a strip": lambda i: i.crop((0, 50, 360, 320)),
}


@pytest.mark.parametrize("how", CHANGED)
def test_what_was_done_to_an_image_does_not_hide_it(how):
    """Each of five scenes is found beside its copy, and with nothing else."""
    everything = [likeness_of_scene(seed) for seed in range(5)] + [likeness(CHANGED[how](scene(seed))) for seed in range(5)]
    assert near_duplicates(everything) == [[seed, seed + 5] for seed in range(5)]


def test_stereo_twins_are_found():
    """Two views from a step aside: no shift of a whole makes one of the other."""
    everything = [likeness(scene(seed, aside)) for seed in (20, 21, 22) for aside in (0.0, 0.8)]
    assert near_duplicates(everything) == [[0, 1], [2, 3], [4, 5]]


def texture(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    kinds = (rng.integers(0, 255, (96, 96, 3)), rng.integers(0, 255, (5, 5, 3)), np.full((2, 2, 3), rng.integers(0, 255, 3)))
    return Image.fromarray(kinds[seed % 3].astype(np.uint8)).resize((120, 100), Image.Resampling.BICUBIC)


def test_strangers_are_not_grouped():
    """Noise, smooth colours, flat colours and scenes, of as many seeds as kinds that look alike to a hash without colours."""
    assert (
        near_duplicates([likeness(texture(seed)) for seed in range(60)] + [likeness(scene(s, side=200)) for s in range(30, 50)])
        == []
    )


def test_a_likeness_is_packed_without_loss_that_counts():
    """Whatever is read back is what was written; anything else is no likeness."""
    found = likeness(scene(3))
    again = Likeness.unpacked(found.packed())
    assert again.whole == found.whole and (again.hashes == found.hashes).all() and (again.colours == found.colours).all()
    np.testing.assert_allclose(again.places, found.places, atol=2**-12)
    assert again.packed() == found.packed() and len(found.hashes) > 20
    assert len(likeness(scene(3), places=False).hashes) == 0
    for text in ("", "abcd", found.packed()[:-8], "!"):
        with pytest.raises(ValueError, match=r"likeness|base64|padding|Only"):
            Likeness.unpacked(text)
    assert likeness(scene(3).transpose(Image.Transpose.FLIP_LEFT_RIGHT)).whole == found.whole ^ MIRROR
    assert likeness(Image.new("RGB", (1, 3000))).sides.max() <= 8, "a strip of any length takes no more than others"


@pytest.mark.parametrize("distance", [0, 1, 6, 10])
def test_near_pairs_link_what_all_pairs_link(distance):
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, 900, dtype=np.uint64)
    for i in range(300, 600):  # near a hash of the first 300, by up to 12 bits
        flips = rng.choice(64, rng.integers(0, 13), replace=False)
        hashes[i] = hashes[i - 300] ^ np.bitwise_or.reduce(np.uint64(1) << flips.astype(np.uint64), initial=np.uint64(0))
    hashes[600:640] = hashes[0]
    labels = connected_components(np.bitwise_count(hashes[:, None] ^ hashes[None]) <= distance)[1]
    expected = [np.flatnonzero(labels == k).tolist() for k in np.unique(labels) if (labels == k).sum() > 1]
    assert sorted(linked(near_pairs(hashes, distance), 900)) == sorted(expected) and len(expected) >= 10
    assert near_duplicates([]) == [] and len(near_pairs(hashes[:0])) == 0


def walk(count: int) -> list[Likeness]:
    """Each like the one before it, the first unlike the last."""
    rng, whole, found = np.random.default_rng(1), np.uint64(0x5A5A0F0F12345678), []
    for _ in range(count):
        whole = whole ^ (np.uint64(1) << np.uint64(rng.integers(64)))
        found.append(Likeness(whole, np.full(27, 100, np.uint8), np.ones(2), np.empty(0, np.uint64), np.empty((0, 3))))
    return found


def test_a_hundred_thousand_images_take_seconds():
    rng = np.random.default_rng(2)
    hashes = rng.integers(0, 2**63, 100_000, dtype=np.uint64)
    hashes[50_000:50_500] = hashes[:500] ^ np.uint64(0b10011)
    started = time.process_time()
    assert len(near_pairs(np.concatenate([hashes, hashes ^ MIRROR]))) == 1000
    assert time.process_time() - started < 20, "1.0 s where it was measured; all pairs would take minutes"


# --- what is held out ---


def sample(name: str, like: str = "") -> CroppedImage:
    sha256 = hashlib.sha256(name.encode()).hexdigest()
    return CroppedImage(Sample(name, (name,), 9, 9, sha256, 0, NOWHERE, like), ())


IMAGES = [sample(str(i)) for i in range(60)]
SHA = [p.sample.sha256 for p in IMAGES]


GROUPS = [[SHA[:2], SHA[5:9]], [SHA[i : i + 2] for i in range(0, 60, 2)], [SHA[:50]], [SHA[:30], SHA[30:]]]


@pytest.mark.parametrize("share", ["auto", 0.1, 0.5])
@pytest.mark.parametrize(
    "near", [[SHA[:2], SHA[5:9]], [SHA[i : i + 2] for i in range(0, 60, 2)], [SHA[:50]], [SHA[:30], SHA[30:]]]
)
def test_groups_are_held_out_whole_in_any_order(near, share):
    found = split(IMAGES, share, near)
    held, train = {p.sample.sha256 for p in found.held}, {p.sample.sha256 for p in found.train}
    assert held and train and not held & train and len(held | train) == 60
    assert all(set(group) <= held or set(group) <= train for group in near)
    mixed = random.Random(1).sample(IMAGES, 60)
    other = split(mixed, share, [random.Random(2).sample(group, len(group)) for group in reversed(near)])
    assert {p.sample.sha256 for p in other.held} == held
    assert {other.unit(p) for p in IMAGES} == {found.unit(p) for p in IMAGES}
    assert len({found.unit(p) for p in IMAGES}) == 60 - sum(len(group) - 1 for group in near)
    if len(near) != 2 or len(near[0]) != 30:
        assert len(held) <= round(60 * (0.2 if share == "auto" else share)), "no more than that share"


def test_a_thousand_images_in_a_chain_are_one_group_that_is_told(image_recipe, monkeypatch, tmp_path):
    """It is trained on, not held out by chance as the whole of validation."""
    chain = [sample(f"c{i}", like.packed()) for i, like in enumerate(walk(1000))]
    assert np.bitwise_count(walk(1000)[0].whole ^ walk(1000)[-1].whole) > 10
    groups = near_duplicates([Likeness.unpacked(p.sample.likeness) for p in chain])
    assert len(groups) == 1 and len(groups[0]) == 1000
    usable = look(load_recipe(image_recipe), lambda line: None)
    everything = [*usable.images, *chain]
    found = split(everything, "auto", [[p.sample.sha256 for p in chain]])
    assert not {p.sample.name for p in found.held} & {p.sample.name for p in chain} and len(found.held) >= 1
    said = near_words(replace(usable, images=everything, split=found))
    assert "1,000 images in 1 group of near-duplicates" in said[0] and "1,000 of 1,012 images are one group" in said[1]


def test_groups_are_kept_with_the_cache_and_found_again_where_they_are_damaged(own, monkeypatch):
    """Nothing is looked at twice; a cropped copy of a held-out image is held out with it."""
    recipe, folder = own
    first = look(load_recipe(recipe), lambda line: None)
    assert first.split.near == {}
    held = next(p for p in first.split.held)
    file = next(f for f in folder.glob("*.png") if f.name in held.sample.name)
    with Image.open(file) as image:
        image.resize((image.width * 2, image.height * 2)).save(folder / "copy.png")
    (folder / "copy.txt").write_text("a copy")
    second = look(load_recipe(recipe), lambda line: None)
    group = second.split.near
    assert len(group) == 2 and held.sample.sha256 in group and len(set(group.values())) == 1
    sides = [{p.sample.name for p in part} for part in (second.split.held, second.split.train)]
    assert any({held.sample.name, "photos/copy.png"} <= side for side in sides)
    kept = folder.parent / "cache" / "duplicates.json"
    before = kept.read_bytes()
    monkeypatch.setattr("dedistill.data.usable.near_duplicates", lambda images: pytest.fail("looked for again"))
    assert look(load_recipe(recipe), lambda line: None).split == second.split
    monkeypatch.undo()
    kept.write_bytes(before[:20])
    assert look(load_recipe(recipe), lambda line: None).split == second.split and kept.read_bytes() == before


def test_hints_come_once_with_their_reason(own):
    """When images are encoded for the first time, and never again; captions that are as they should be cause none."""
    recipe, folder = own
    said = []
    options = {"device": "cpu", "say": said.append}
    with Image.open(folder / "p00.png") as image:
        image.resize((180, 190)).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / "q.png")
    (folder / "q.txt").write_text("one caption\nand another")
    open_data(load_recipe(recipe), **options)
    assert sum("near-duplicates" in line for line in said) == sum("data.split_lines = 'never'" in line for line in said) == 1
    assert sum("follows both kinds of prompts" in line for line in said) == 1
    said.clear()
    open_data(load_recipe(recipe), **options)
    assert said == ["data: source 'photos': 13 images"]


def test_of_too_many_images_it_is_said_that_crops_are_not_looked_for(image_recipe, monkeypatch):
    usable = look(load_recipe(image_recipe), lambda line: None)
    assert not [line for line in hints(usable) if "too many to look for crops" in line]
    monkeypatch.setattr("dedistill.data.usable.MOST_CROPPED", 3)
    assert [line for line in hints(usable) if "12 images are too many to look for crops among (the limit is 3)" in line]
