"""Images, faults that are put into them, and formulas that were tried and left out, for lab/artefacts.py."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from dedistill.data.digits import DigitSource
from dedistill.evaluation.numbers import END, SHADOW_PATCH, blur, clipped, colour, detail, luma, shadow, shrunk


def photographs(side: int, stride: int) -> np.ndarray:
    """Crops [N, 3, side, side] of scikit-learn's two photographs with something in them: a standard deviation of .2 or more."""
    from sklearn.datasets import load_sample_images

    found = []
    for image in load_sample_images().images:
        x = image.transpose(2, 0, 1) / 127.5 - 1
        rows, columns = (range(0, n - side + 1, stride) for n in x.shape[1:])
        found += [x[:, i : i + side, j : j + side] for i in rows for j in columns]
    return np.stack([x for x in found if x.std() >= 0.2])


def handwritten(source: DigitSource, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Held-out digits [N, 1, h, w], of a source's usual width, and what they show [N]: the label of the first digit."""
    (images, labels), n = source.held_out, source.per_image
    x = np.concatenate([images[k : n * count : n] for k in range(n)], axis=2)[:, None]
    return x.astype(float), labels[: n * count : n]


def harmless(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Another take of each image, no worse: moved by up to a pixel, gain .9 to 1.1, brightness +-.05, noise of 8 bits."""
    moved = [np.roll(p, rng.integers(-1, 2, 2), (1, 2)) for p in x]
    one = (len(x), 1, 1, 1)
    return np.stack(moved) * rng.uniform(0.9, 1.1, one) + rng.uniform(-0.05, 0.05, one) + rng.normal(0, 1 / 255, x.shape)


def blurred(x: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    return ndimage.gaussian_filter(x, (0, 0, sigma, sigma), mode="nearest") if sigma else x


def shadowed(x: np.ndarray, depth: float, rng: np.random.Generator) -> np.ndarray:
    """Three soft dark blotches anywhere, of a radius of .12 to .25 of the shorter side; ``depth``: share of light they take."""
    y, z = np.mgrid[: x.shape[2], : x.shape[3]]
    side, found = min(x.shape[2:]), []
    for image in x:
        cover = np.zeros(x.shape[2:])
        for _ in range(3):
            radius, cy, cz = rng.uniform(0.12, 0.25) * side, rng.uniform(0, x.shape[2]), rng.uniform(0, x.shape[3])
            cover = np.maximum(cover, np.exp(-((y - cy) ** 2 + (z - cz) ** 2) / (2 * radius**2)))
        found.append((image + 1) * (1 - depth * cover) - 1)
    return np.stack(found)


def gained(x: np.ndarray, gain: float, rng: np.random.Generator) -> np.ndarray:
    return x * gain


def coloured(x: np.ndarray, gain: float, rng: np.random.Generator) -> np.ndarray:
    grey = luma(x)[:, None]
    return grey + gain * (x - grey)


def noisy(x: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    return x + rng.normal(0, 1, x.shape) * sigma


@dataclass(frozen=True)
class Fault:
    """strengths[0] is none at all; ``cross`` is the strength of the table of meters against faults."""

    apply: Callable[[np.ndarray, float, np.random.Generator], np.ndarray]
    says: str
    strengths: tuple[float, ...]
    cross: float


FAULTS = {
    "blur": Fault(blurred, "Gaussian blur, sigma in pixels", (0, 0.5, 1, 2, 4), 2),
    "shadow": Fault(shadowed, "three soft dark blotches, depth", (0, 0.2, 0.4, 0.6, 0.8), 0.6),
    "clipped": Fault(gained, "gain, then clipped", (1, 1.25, 1.5, 2, 3), 2),
    "colour": Fault(coloured, "gain of colour around grey", (1, 1.25, 1.5, 2, 3), 2),
    "noise": Fault(noisy, "noise", (0, 0.1), 0.1),
}


def _laplacian(x: np.ndarray) -> np.ndarray:
    """Variance of the Laplacian over that of the image (Pech-Pacheco et al. 2000), in logarithms, falling."""
    grey = luma(x)
    edges = np.stack([ndimage.laplace(g) for g in grey])
    return np.log(grey.var((1, 2)) + 1e-9) - np.log(edges.var((1, 2)) + 1e-9)


def _slope(x: np.ndarray) -> np.ndarray:
    """Slope of the power spectrum over frequency, both in logarithms, with a Hann window."""
    grey = luma(x)
    h, w = grey.shape[1:]
    window = np.hanning(h)[:, None] * np.hanning(w)
    power = np.abs(np.fft.fft2((grey - grey.mean((1, 2), keepdims=True)) * window)) ** 2
    radius = np.hypot(np.fft.fftfreq(h)[:, None], np.fft.fftfreq(w))
    used = (radius > 1.5 / min(h, w)) & (radius < 0.5)
    return -np.polyfit(np.log(radius[used]), np.log(power[:, used].T + 1e-9), 1)[0]


def _illumination(x: np.ndarray) -> np.ndarray:
    light = shrunk((luma(x)[:, None] + 1) / 2)[:, 0]
    sigma = min(light.shape[1:]) / 8
    return ndimage.gaussian_filter(light, (0, sigma, sigma), mode="nearest")


def _darkest(x: np.ndarray) -> np.ndarray:
    """Light under a heavy Gaussian: its median over its least, in logarithms."""
    light = np.log(_illumination(x) + 0.05)
    return np.median(light, axis=(1, 2)) - light.min((1, 2))


def _uneven(x: np.ndarray) -> np.ndarray:
    """Light under a heavy Gaussian: standard deviation."""
    return _illumination(x).std((1, 2))


def _dim(x: np.ndarray) -> np.ndarray:
    """The bright channel without its 95 % quantile: 1 less its mean."""
    light = shrunk((x + 1) / 2).max(1)
    patch = max(3, min(light.shape[1:]) // SHADOW_PATCH | 1)
    return 1 - ndimage.maximum_filter(light, (1, patch, patch), mode="nearest").mean((1, 2))


METERS = {"blur": blur, "shadow": shadow, "clipped": clipped, "colour": colour}
RIVALS = {
    "blur": {
        "re-blur, 9 taps": lambda x: blur(x, 9),
        "Laplacian": _laplacian,
        "spectral slope": _slope,
        "less detail": lambda x: -detail(x),
    },
    "shadow": {"heavy Gaussian, darkest": _darkest, "heavy Gaussian, uneven": _uneven, "bright channel, absolute": _dim},
    "clipped": {
        "at an end": lambda x: (np.abs(x) >= END).mean((1, 2, 3)),
        "at the upper end": lambda x: (x >= END).mean((1, 2, 3)),
    },
    "colour": {"mean of max - min": lambda x: (x.max(1) - x.min(1)).mean((1, 2))},
}
"""Formulas for the same fault, which the curves were to choose among."""


def mixed(x: np.ndarray, share: float) -> np.ndarray:
    """[S, P, ...] -> each image of a prompt with ``share`` of the mean over its seeds."""
    return (1 - share) * x + share * x.mean(0, keepdims=True)


def copied(x: np.ndarray, share: float) -> np.ndarray:
    """[S, P, ...] -> of a prompt's seeds beyond the first, ``share`` repeat the first."""
    made = x.copy()
    made[1 : 1 + round(share * (len(x) - 1))] = x[0]
    return made


COLLAPSES = {"mixed": (mixed, (0, 0.25, 0.5, 0.75, 1)), "copied": (copied, (0, 0.33, 0.67, 1))}


def _plain_distance(x: np.ndarray) -> np.ndarray:
    """Root mean square distance of two seeds, not relative to anything."""
    return np.sqrt(2 * x.var(0, ddof=1).mean((1, 2, 3)))


def _correlation(x: np.ndarray) -> np.ndarray:
    """1 less the mean correlation of two seeds."""
    flat = x.reshape(*x.shape[:2], -1).transpose(1, 0, 2)
    flat = flat - flat.mean(2, keepdims=True)
    flat = flat / np.maximum(np.linalg.norm(flat, axis=2, keepdims=True), 1e-9)
    n = x.shape[0]
    return 1 - ((flat @ flat.transpose(0, 2, 1)).sum((1, 2)) - n) / (n * (n - 1))


DIVERSITY_RIVALS = {"plain distance": _plain_distance, "1 - correlation": _correlation}
