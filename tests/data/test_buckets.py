"""Crops: the buckets are diffusers', every window lies inside its image, and a crop depends on its key alone."""

from dataclasses import dataclass

import numpy as np
import pytest
from diffusers.training_utils import find_nearest_bucket, generate_aspect_ratio_buckets
from PIL import Image
from sklearn.datasets import load_sample_images

from dedistill.data.images.buckets import MIN_KEPT, MODES, Crop, apply_crop, buckets_for, crops_of, too_small


@dataclass(frozen=True)
class Sized:
    sha256: str
    width: int
    height: int


RNG = np.random.default_rng(0)
IMAGES = [Sized(f"set/{i}.jpg", *map(int, RNG.integers(200, 3000, 2))) for i in range(120)]
SETTINGS = {"resolutions": [256, 512], "modes": ["aspect"], "per_image": 1, "seed": 0}


def crops(image: Sized, **changes) -> list[Crop]:
    return crops_of(image, **SETTINGS | changes)


def test_buckets_are_those_of_diffusers():
    """The bucket list of each resolution, one after the other."""
    assert buckets_for([512]) == generate_aspect_ratio_buckets(512, 16)
    both = generate_aspect_ratio_buckets(512, 32) + generate_aspect_ratio_buckets(1024, 32)
    assert buckets_for([512, 1024], 32) == list(dict.fromkeys(both))
    for height, width in buckets_for([256, 512, 768, 1024]):
        assert height % 16 == width % 16 == 0


@pytest.mark.parametrize("mode", ["aspect", "center"])
def test_nearest_bucket_is_that_of_diffusers(mode):
    ladder = generate_aspect_ratio_buckets(256, 16)
    for image in IMAGES:
        nearest = ladder[find_nearest_bucket(image.height, image.width, ladder)]
        for crop in crops(image, resolutions=[256], modes=[mode]):
            assert (crop.height, crop.width) == nearest


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("max_upscale", [1.0, 1.5])
def test_windows_lie_inside_and_have_the_aspect_of_their_bucket(mode, max_upscale):
    """Aspect kept, nothing enlarged beyond the limit; each window spans the image in one direction."""
    seen = 0
    for image in IMAGES:
        for crop in crops(image, modes=[mode], per_image=3, max_upscale=max_upscale):
            left, top, right, bottom = crop.box
            assert 0 <= left < right <= image.width and 0 <= top < bottom <= image.height
            assert (crop.height, crop.width) in buckets_for([crop.resolution])
            assert (right - left) / (bottom - top) == pytest.approx(crop.width / crop.height, rel=1e-9)
            assert crop.width / (right - left) <= max_upscale * (1 + 1e-9)
            spans = (right - left) / image.width, (bottom - top) / image.height
            assert max(spans) == pytest.approx(1, abs=1e-9)
            seen += 1
    assert seen > 300 or mode == "center"


def test_modes():
    """Square and random-aspect crops."""
    image = Sized("x", 1600, 1000)
    square = crops(image, modes=["square"], per_image=50)
    assert {(c.height, c.width) for c in square} == {(256, 256), (512, 512)}
    assert len({c.box for c in square if c.resolution == 512}) == 50
    center = crops(image, modes=["center"], per_image=50)
    assert [c.resolution for c in center] == [256, 512]
    for crop in center:
        left, top, right, bottom = crop.box
        assert (left + right, top + bottom) == pytest.approx((1600, 1000))
    free = crops(image, modes=["random_aspect"], per_image=200, resolutions=[512])
    shapes = {(c.height, c.width) for c in free}
    near = {(h, w) for h, w in buckets_for([512]) if MIN_KEPT <= w / h / 1.6 <= 1 / MIN_KEPT}
    assert shapes == near and len(near) > 4
    for crop in free:
        left, top, right, bottom = crop.box
        assert (right - left) * (bottom - top) >= MIN_KEPT * 1600 * 1000 * (1 - 1e-9)


def test_random_positions_cover_the_image_evenly():
    wide = [p for p in IMAGES if p.width > 1.3 * p.height]
    lefts = [c.box[0] / (p.width - p.height) for p in wide for c in crops(p, modes=["square"], per_image=20)]
    shares = np.array(lefts)
    assert len(shares) > 1000 and abs(shares.mean() - 0.5) < 0.03 and abs(shares.std() - 12**-0.5) < 0.02


def test_modes_take_turns():
    """Both modes in each image's crops; each first in half the images."""
    wide = [Sized(f"{i}", 1600, 1000) for i in range(400)]
    first = 0
    for image in wide:
        two = crops(image, modes=["square", "aspect"], per_image=2, resolutions=[512])
        assert {c.height == c.width for c in two} == {True, False}
        first += crops(image, modes=["square", "aspect"], resolutions=[512])[0].width == 512
    assert abs(first / 400 - 0.5) < 0.08


def test_a_mode_that_does_not_fit_leaves_its_turn():
    image = Sized("x", 1200, 450)  # too low for a square of 512, big enough for a wide bucket
    both = crops(image, modes=["square", "aspect"], per_image=4, resolutions=[512])
    assert len(both) == 4 and all(c.width > c.height for c in both)
    assert crops(image, modes=["square"], resolutions=[512]) == []


def test_too_small():
    """Each resolution the image is big enough for, never one above; none at all is said with the sizes."""
    for side, expected in ((255, []), (256, [256]), (511, [256]), (512, [256, 512]), (5000, [256, 512])):
        assert [c.resolution for c in crops(Sized("x", side, side), modes=["square"])] == expected
    assert [c.resolution for c in crops(Sized("x", 250, 250), modes=["square"], max_upscale=1.1)] == [256]
    reason = too_small(Sized("x", 250, 200), resolutions=[512, 256])
    assert reason == "too small: 250 x 200 pixels do not cover a bucket of resolution 256"
    assert "enlarged 1.2 times" in too_small(Sized("x", 200, 200), resolutions=[256], max_upscale=1.2)


def test_equal_crops_come_once():
    assert len(crops(Sized("x", 512, 512), modes=["square"], per_image=5, resolutions=[512])) == 1


def test_a_crop_depends_on_its_key_alone():
    settings = {"modes": ["square", "random_aspect"], "per_image": 4, "resolutions": [256, 512]}
    forward = {p.sha256: crops(p, **settings) for p in IMAGES}
    backward = {p.sha256: crops(p, **settings) for p in reversed(IMAGES)}
    assert forward == backward
    big = Sized("x", 2000, 1500)
    more = crops(big, **settings | {"per_image": 6})
    assert crops(big, **settings) == more[:4] + more[6:10]
    assert crops(big, **settings) != crops(big, **settings | {"seed": 1})
    assert crops(big, **settings) != crops(Sized("y", 2000, 1500), **settings)


def test_the_pixels_of_a_crop():
    """A window of whole pixels without resizing is the image's own; with resizing, Pillow's crop and resize."""
    china = Image.fromarray(load_sample_images().images[0])
    same = apply_crop(china, Crop(256, 256, 256, (10.0, 20.0, 266.0, 276.0)))
    assert same.dtype == np.uint8 and np.array_equal(same, np.asarray(china)[20:276, 10:266])
    half = apply_crop(china, Crop(128, 128, 192, (0.0, 0.0, 384.0, 256.0)))
    direct = np.asarray(china.crop((0, 0, 384, 256)).resize((192, 128), Image.Resampling.LANCZOS))
    assert half.shape == (128, 192, 3)
    assert np.array_equal(half[:-3, :-3], direct[:-3, :-3])  # at the cut edges ours still sees the pixels beyond
    image = Sized("china", *china.size)
    for crop in crops(image, modes=list(MODES), per_image=8, resolutions=[256, 384]):
        assert apply_crop(china, crop).shape == (crop.height, crop.width, 3)


def test_a_flat_gradient_lands_where_the_box_says():
    """The mean of the crop is the ramp's value at the middle of the box, to a fraction of a pixel."""
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, 511).astype(np.uint8)[None, :, None], (300, 1, 3)))
    for crop in crops(Sized("ramp", 511, 300), modes=["square"], per_image=6, resolutions=[256]):
        middle = (crop.box[0] + crop.box[2]) / 2 / 511 * 255
        assert apply_crop(ramp, crop).mean() == pytest.approx(middle, abs=0.8)
