"""What tells copies of an image from other images: a perceptual hash of the whole, its colours, and hashes of distinct places.

The whole is found again when it is resized, compressed or mirrored; the places (extrema of differences of Gaussians in
space and scale: Lowe 2004, IJCV 60, sec. 3) when it is cropped as well, or taken from a few steps aside. Hashes are the signs
of 64 low frequencies of a cosine transform, so that mirroring an image flips known bits.
"""

import base64
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage
from scipy.fft import dctn

VERSION = 1
"""To be raised when equal images no longer give equal likenesses: indexes of another one are made anew."""
SIDES = 64, 192
"""Places are looked for in an image of the pixels of a square of this side, at least and at most."""
LONGEST = 8
"""Times as long as the square may a strip be; longer ones are squeezed."""
UNIT = 4096
PLACES = 64
LEAST_CONTRAST = 1.0
"""Of 255, that a place differs by from around it."""
FIRST, STEP, LEVELS = 1.6, 2 ** (1 / 3), 12
"""Pixels of the finest blur, the factor to the next one, and how many there are."""
REACH = 5.0
"""Half the side of the patch that is hashed, in blurs of its place."""
PATCH = 16
_FREQUENCIES = sorted(((y, x) for y in range(9) for x in range(9) if y + x), key=lambda f: (sum(f), f))[:64]
_ROWS, _COLUMNS = np.array(_FREQUENCIES).T
_BITS = np.uint64(1) << np.arange(64, dtype=np.uint64)
MIRROR = np.bitwise_or.reduce(_BITS[_COLUMNS % 2 == 1])
"""The bits that change when an image is mirrored left to right."""


@dataclass(frozen=True)
class Likeness:
    """whole: hash; colours: mean RGB of 3 x 3 fields [27]; sides [2]: width and height; hashes [P] of places [P, 3]: x, y and
    scale. Lengths are in sides of a square of as many pixels as the image."""

    whole: np.uint64
    colours: np.ndarray
    sides: np.ndarray
    hashes: np.ndarray
    places: np.ndarray

    def packed(self) -> str:
        """As text; lengths to a 4096th."""
        lengths = (np.concatenate([self.sides, self.places.ravel()]) * UNIT).round()
        parts = (self.whole.astype("<u8"), self.colours, self.hashes.astype("<u8"), lengths.astype("<u2"))
        return base64.b64encode(b"".join(part.tobytes() for part in parts)).decode()

    @classmethod
    def unpacked(cls, text: str) -> "Likeness":
        """Of what ``packed`` gave. Raises ValueError for anything else."""
        data = base64.b64decode(text, validate=True)
        count, rest = divmod(len(data) - 39, 14)
        if count < 0 or rest:
            raise ValueError(f"a likeness of {len(data)} bytes")
        cut = 35 + 8 * count
        lengths = np.frombuffer(data[cut:], "<u2") / UNIT
        whole, colours = np.frombuffer(data[:8], "<u8")[0], np.frombuffer(data[8:35], np.uint8)
        return cls(whole, colours, lengths[:2], np.frombuffer(data[35:cut], "<u8"), lengths[2:].reshape(count, 3))


def likeness(image: Image.Image, *, places: bool = True) -> Likeness:
    """The likeness of an RGB image, with places or without. A function of its pixels alone."""
    own = (image.width * image.height) ** 0.5
    side = min(max(own, SIDES[0]), SIDES[1])
    width, height = (round(min(max(n * side / own, side / LONGEST), side * LONGEST)) for n in image.size)
    small = image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=2)
    grey = small.convert("L")
    whole = _hash(np.asarray(grey.resize((32, 32), Image.Resampling.BOX), dtype=np.float32)[None])[0]
    colours = np.asarray(small.resize((3, 3), Image.Resampling.BOX)).reshape(27)
    hashes, found = _places(np.asarray(grey, dtype=np.float32)) if places else (np.empty(0, np.uint64), np.empty((0, 3)))
    return Likeness(whole, colours, np.array([width, height]) / side, hashes, found / side)


def _hash(patches: np.ndarray) -> np.ndarray:
    """[..., n, n] -> [...] uint64."""
    waves = dctn(patches, axes=(-2, -1))[..., _ROWS, _COLUMNS]
    return ((waves > 0) * _BITS).sum(-1, dtype=np.uint64)


def _places(grey: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hashes [P] of the extrema of most contrast in grey [h, w], and where they are [P, 3]: x, y and blur in pixels."""
    blurs = np.stack([ndimage.gaussian_filter(grey, FIRST * STEP**k, mode="nearest") for k in range(LEVELS)])
    bands = np.diff(blurs, axis=0)
    inner = bands[1:-1, 1:-1, 1:-1]
    extreme = (inner == _around(bands, np.maximum)) | (inner == _around(bands, np.minimum))
    level, y, x = (found + 1 for found in np.nonzero(extreme & (np.abs(inner) > LEAST_CONTRAST)))
    order = np.argsort(-np.abs(bands[level, y, x]), kind="stable")[:PLACES]
    level, y, x = level[order], y[order], x[order]
    blur = FIRST * STEP ** (level + _peak(bands[level - 1, y, x], bands[level, y, x], bands[level + 1, y, x]))
    at = (
        y + _peak(bands[level, y - 1, x], bands[level, y, x], bands[level, y + 1, x]),
        x + _peak(bands[level, y, x - 1], bands[level, y, x], bands[level, y, x + 1]),
    )
    offsets = REACH * blur[:, None] * ((np.arange(PATCH) + 0.5) * 2 / PATCH - 1)
    # as fine as the patch is sampled
    finest = (np.log(np.maximum(0.8 * REACH * blur * 2 / PATCH, FIRST) / FIRST) / np.log(STEP)).round().clip(0, LEVELS - 1)
    shape = (len(blur), PATCH, PATCH)
    points = (finest[:, None, None], (at[0][:, None] + offsets)[:, :, None], (at[1][:, None] + offsets)[:, None, :])
    patches = ndimage.map_coordinates(blurs, [np.broadcast_to(p, shape) for p in points], order=1, mode="nearest")
    return _hash(patches), np.stack([at[1], at[0], blur], axis=1)


def _around(bands: np.ndarray, most: np.ufunc) -> np.ndarray:
    """The most of each inner value and its 26 neighbours."""
    for axis in range(3):
        bands = np.moveaxis(bands, axis, 0)
        bands = np.moveaxis(most(most(bands[:-2], bands[1:-1]), bands[2:]), 0, axis)
    return bands


def _peak(before: np.ndarray, here: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Where the parabola through three neighbours has its extremum, in -0.5 ... 0.5 around the middle one."""
    bend = before - 2 * here + after
    return (0.5 * (before - after) / np.where(bend == 0, 1, bend)).clip(-0.5, 0.5)
