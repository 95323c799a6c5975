"""Which window of an image is trained on, at which size: aspect buckets, several resolutions, several crops."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
from PIL import Image

from dedistill.flow import keyed

MIN_KEPT = 0.5
"""A random aspect keeps at least this share of the image."""
SHAPES = ((1, 1), (4, 5), (5, 4), (2, 3), (3, 2), (3, 4), (4, 3), (9, 16), (16, 9), (1, 2), (2, 1))
"""Width to height of the buckets, in the order of diffusers."""
Bucket = tuple[int, int]


class Sized(Protocol):
    """``width`` and ``height`` in pixels, upright."""

    @property
    def width(self) -> int: ...

    @property
    def height(self) -> int: ...


class Croppable(Sized, Protocol):
    """An image as far as cropping goes."""

    @property
    def sha256(self) -> str: ...


@dataclass(frozen=True)
class Crop:
    """``box`` (left, top, right, bottom; pixels of the original, fractions allowed) resized to height x width."""

    resolution: int
    height: int
    width: int
    box: tuple[float, float, float, float]


@lru_cache
def _ladder(resolution: int, divisible: int) -> tuple[Bucket, ...]:
    """The buckets of one resolution, as diffusers makes them; without it, as a look at images needs none of its imports."""

    def side(length: float) -> int:
        return max(divisible, round(length / divisible) * divisible)

    heights = [(((resolution * resolution) / (w / h)) ** 0.5, w / h) for w, h in SHAPES]
    return tuple(dict.fromkeys((side(height), side(height * aspect)) for height, aspect in heights))


def buckets_for(resolutions: Sequence[int], divisible: int = 16) -> list[Bucket]:
    """Every (height, width) that crops can have: about resolution^2 pixels each, sides multiples of ``divisible``."""
    return list(dict.fromkeys(bucket for r in resolutions for bucket in _ladder(r, divisible)))


def crops_of(
    sample: Croppable,
    *,
    resolutions: Sequence[int],
    modes: Sequence[str],
    per_image: int,
    seed: int,
    max_upscale: float = 1.0,
    divisible: int = 16,
) -> list[Crop]:
    """All crops of one image: ``per_image`` at each resolution it is big enough for, equal ones once.

    The list depends on (seed, bytes, size) and the settings alone. An image is big enough when it covers the bucket
    without growing by more than ``max_upscale``; one that fits no resolution has no crops (``too_small`` says why).
    ``modes`` (keys of ``MODES``) take turns, from a first one that differs between images, and a mode that does
    not fit leaves its turn to the others.
    """
    crops = []
    turn = int(len(modes) * keyed.generator(seed, f"crop-mode/{sample.sha256}").random())
    for resolution in resolutions:
        fitting = [b for b in _ladder(resolution, divisible) if _scale(sample, b) <= max_upscale]
        choices = {mode: chosen for mode in modes if (chosen := MODES[mode](sample, resolution, divisible, fitting))}
        for k in range(per_image if choices else 0):
            mode = list(choices)[(turn + k) % len(choices)]
            which, x, y = keyed.generator(seed, f"crop/{sample.sha256}", resolution, k).random(3).tolist()
            bucket = choices[mode][int(which * len(choices[mode]))]
            x, y = (0.5, 0.5) if mode == "center" else (x, y)
            crops.append(Crop(resolution, *bucket, _window(sample, bucket, x, y)))
    return list(dict.fromkeys(crops))


def too_small(sample: Sized, *, resolutions: Sequence[int], max_upscale: float = 1.0) -> str:
    """The reason to give for an image without crops."""
    lowest = min(resolutions)
    grown = f" even enlarged {max_upscale:g} times" if max_upscale != 1 else ""
    return f"too small: {sample.width} x {sample.height} pixels{grown} do not cover a bucket of resolution {lowest}"


def needed_upscale(sample: Sized, *, resolutions: Sequence[int], modes: Sequence[str], divisible: int = 16) -> float:
    """The least ``max_upscale`` with which the image has crops; infinite where no bucket has a shape near its own."""
    found = [
        _scale(sample, bucket)
        for resolution in resolutions
        for mode in modes
        for bucket in MODES[mode](sample, resolution, divisible, list(_ladder(resolution, divisible)))
    ]
    return min(found, default=math.inf)


def apply_crop(image: Image.Image, crop: Crop) -> np.ndarray:
    """The crop as uint8 [height, width, 3]: one Lanczos resize straight from the original pixels."""
    return np.array(image.resize((crop.width, crop.height), Image.Resampling.LANCZOS, box=crop.box))


def _scale(sample: Sized, bucket: Bucket) -> float:
    """Factor that makes the image just cover the bucket."""
    return max(bucket[0] / sample.height, bucket[1] / sample.width)


def _window(sample: Sized, bucket: Bucket, x: float, y: float) -> tuple[float, float, float, float]:
    """The part of the image that fills the bucket; x and y in 0 ... 1 place it between the edges."""
    scale = _scale(sample, bucket)
    width, height = min(bucket[1] / scale, sample.width), min(bucket[0] / scale, sample.height)
    left, top = x * (sample.width - width), y * (sample.height - height)
    return left, top, min(left + width, sample.width), min(top + height, sample.height)


def _nearest(height: int, width: int, resolution: int, divisible: int, fitting: list[Bucket]) -> list[Bucket]:
    # of equally near ones the last, as in diffusers
    bucket = min(reversed(_ladder(resolution, divisible)), key=lambda b: abs(height * b[1] - width * b[0]))
    return [bucket] if bucket in fitting else []


def _aspect(sample: Sized, resolution: int, divisible: int, fitting: list[Bucket]) -> list[Bucket]:
    return _nearest(sample.height, sample.width, resolution, divisible, fitting)


def _square(sample: Sized, resolution: int, divisible: int, fitting: list[Bucket]) -> list[Bucket]:
    return _nearest(1, 1, resolution, divisible, fitting)


def _random_aspect(sample: Sized, resolution: int, divisible: int, fitting: list[Bucket]) -> list[Bucket]:
    own = sample.width / sample.height
    return [(h, w) for h, w in fitting if min(w / h / own, own / (w / h)) >= MIN_KEPT]


MODES: dict[str, Callable[[Sized, int, int, list[Bucket]], list[Bucket]]] = {
    "aspect": _aspect,
    "square": _square,
    "random_aspect": _random_aspect,
    "center": _aspect,
}
"""The buckets each mode draws from. Positions are random in all modes but ``center``."""
