"""Numbers of single images, what each means and which way it is better: damage by guidance, and what judges say.

Each is measured on images as they are saved, clamped to [-1, 1]; ``docs/artefacts.md`` has what they see and what not.
"""

from typing import Any

import numpy as np
from scipy import ndimage
from torch import Tensor

from dedistill.errors import UserError

# --- what goes wrong in images when guidance is too strong, in numbers that need neither a reference nor a judge ---


BLUR_TAPS = 5
"""Crete's 9 are more than an image of 8 pixels has, and see less of weak blur."""
SHADOW_SIDE = 32
"""Pixels of the shorter side at which shadows are looked for."""
SHADOW_PATCH = 4
"""A shadow is wider than the shorter side over this."""
END = 1 - 2 / 255
"""From here on a value is at the end of its range: the last step of 8 bits."""
FLOOR = 0.02
"""Light, of 1, that is added where light divides light: black has no shadows."""


def artefacts(images: Tensor) -> dict[str, np.ndarray]:
    """blur, shadow, clipped, and for three channels colour, of each image: [B] each, finite, from [B, C, H, W]."""
    x = np.nan_to_num(images.double().numpy(), nan=0.0).clip(-1, 1)
    found = {"blur": blur(x), "shadow": shadow(x), "clipped": clipped(x)}
    return found | ({"colour": colour(x)} if x.shape[1] == 3 else {})


def luma(x: np.ndarray) -> np.ndarray:
    """[B, C, H, W] -> [B, H, W]: ITU-R BT.601 weights for three channels, else their mean."""
    return np.tensordot(x, [0.299, 0.587, 0.114], (1, 0)) if x.shape[1] == 3 else x.mean(1)


def blur(x: np.ndarray, taps: int = BLUR_TAPS) -> np.ndarray:
    """How little blurring again changes [B], 0 to 1 (Crete et al. 2007, "The blur effect"); 1 for an image without steps.

    1 less the share of the steps between neighbours that a mean over ``taps`` pixels along them takes away; the greater of
    the two directions.
    """
    grey, found = luma(x), []
    for axis in (1, 2):
        steps = np.abs(np.diff(grey, axis=axis))
        left = np.abs(np.diff(ndimage.uniform_filter1d(grey, taps, axis=axis, mode="nearest"), axis=axis))
        lost, total = np.maximum(steps - left, 0).sum((1, 2)), steps.sum((1, 2))
        found.append(1 - np.divide(lost, total, out=np.zeros_like(total), where=total > 0))
    return np.maximum(*found)


def shadow(x: np.ndarray) -> np.ndarray:
    """Share of light that is missing where even the brightest thing around is dark [B]; 0 for even light.

    The bright channel (Panagopoulos et al. 2010, "Estimating shadows with the bright channel cue"), the greatest value of
    all channels within a patch, is near the brightness of the light wherever something bright lies, so dark things do
    not lower it and large soft shadows do. Here: 1 - mean / 95 % quantile of it, at 32 pixels and patches of a quarter.
    """
    light = shrunk((x + 1) / 2).max(1)
    patch = max(3, min(light.shape[1:]) // SHADOW_PATCH | 1)
    bright = ndimage.maximum_filter(light, (1, patch, patch), mode="nearest")
    bright = ndimage.gaussian_filter(bright, (0, patch / 3, patch / 3), mode="nearest")
    return np.maximum(0, 1 - (bright.mean((1, 2)) + FLOOR) / (np.quantile(bright, 0.95, axis=(1, 2)) + FLOOR))


def shrunk(x: np.ndarray) -> np.ndarray:
    """Means of whole square blocks, as many as leave 32 to 63 pixels of the shorter side; smaller images as they are."""
    block = max(1, min(x.shape[2:]) // SHADOW_SIDE)
    h, w = x.shape[2] // block, x.shape[3] // block
    return x[:, :, : h * block, : w * block].reshape(*x.shape[:2], h, block, w, block).mean((3, 5))


def clipped(x: np.ndarray) -> np.ndarray:
    """Share of values [B] that lie at an end of the range together with their four neighbours: areas without any drawing."""
    cross = ndimage.generate_binary_structure(2, 1)[None, None]
    return ndimage.binary_erosion(np.abs(x) >= END, cross, border_value=1).mean((1, 2, 3))


def colour(x: np.ndarray) -> np.ndarray:
    """Colourfulness of RGB images [B], 0 for grey (Hasler & Süsstrunk 2003, "Measuring colourfulness", M3).

    Spread plus .3 of the mean of red - green and of (red + green) / 2 - blue, here for values in [-1, 1].
    """
    opponents = np.stack([x[:, 0] - x[:, 1], (x[:, 0] + x[:, 1]) / 2 - x[:, 2]])
    return np.hypot(*opponents.std((2, 3))) + 0.3 * np.hypot(*opponents.mean((2, 3)))


def diversity(images: Tensor) -> np.ndarray:
    """How far the images of one prompt differ from seed to seed [P], from [S, P, C, H, W] with two seeds or more.

    Root mean square distance of two of them, over that of unrelated images of their contrast and equal mean: about 1
    for unrelated ones, 0 for copies. A black image has contrast 0 and diversity 0.
    """
    x = np.nan_to_num(images.double().numpy(), nan=0.0).clip(-1, 1)
    between, within = x.var(0, ddof=1).mean((1, 2, 3)), x.var((2, 3, 4)).mean(0)
    return np.sqrt(np.divide(between, within, out=np.zeros_like(within), where=within > 1e-12))


# --- numbers of single images that need no judge -------------------------------------------------------------------


SATURATION_LIMIT = 1.1
"""Beyond this magnitude a pixel of a [-1, 1] image is burnt, not just at the edge."""


def image_numbers(images: Tensor) -> dict[str, np.ndarray]:
    """Per image [B], from images [B, C, H, W] before they are clamped.

    saturated: share of pixels beyond +-1.1. contrast: standard deviation. detail; and ``artefacts``' of them clamped.
    """
    x = np.nan_to_num(images.double().numpy(), nan=0.0, posinf=9.0, neginf=-9.0)
    found = {"saturated": (np.abs(x) > SATURATION_LIMIT).mean((1, 2, 3)), "contrast": x.std((1, 2, 3)), "detail": detail(x)}
    return found | artefacts(images)


def detail(x: np.ndarray) -> np.ndarray:
    """Share of the spectrum's energy (without the mean) in the upper half of the frequencies; noise raises it."""
    spectrum = np.abs(np.fft.fft2(x - x.mean((2, 3), keepdims=True))) ** 2
    fy, fx = np.fft.fftfreq(x.shape[2])[:, None], np.fft.fftfreq(x.shape[3])[None]
    high = np.maximum(np.abs(fy), np.abs(fx)) > 0.25
    return (spectrum * high).sum((1, 2, 3)) / np.maximum(spectrum.sum((1, 2, 3)), 1e-12)


# --- what is told of a sweep's cells and images, and which way each number is better -------------------------------


VERSION = 1
"""To be raised when a number is measured in another way: images and numbers of another version are not used."""
NUMBERS: list[dict[str, Any]] = [
    {
        "key": "accuracy",
        "image": "correct",
        "needs": "judge",
        "adherence": True,
        "label": "accuracy",
        "better": "high",
        "help": "Share of digits that an independent classifier reads as asked.",
    },
    {
        "key": "clip",
        "image": "clip",
        "needs": "clip",
        "adherence": True,
        "label": "CLIP score",
        "better": "high",
        "help": "How well CLIP finds that images fit their prompts, of 100.",
    },
    {
        "key": "frechet",
        "label": "Frechet distance",
        "better": "low",
        "help": "Distance of the images to real ones, in 20 components.",
    },
    {
        "key": "clip_frechet",
        "label": "CLIP Frechet distance",
        "better": "low",
        "help": "Distance of the images to real ones in CLIP's eyes; few images raise it.",
    },
    {
        "key": "precision",
        "image": "realistic",
        "needs": "judge",
        "label": "precision",
        "better": "high",
        "help": "Share of images that lie among real ones.",
    },
    {"key": "recall", "label": "recall", "better": "high", "help": "Share of real images that lie among those made."},
    {
        "key": "saturated",
        "image": "saturated",
        "tolerance": 0.02,
        "label": "saturated",
        "better": "low",
        "help": "Share of pixels burnt beyond the range of the data.",
    },
    {
        "key": "clipped",
        "image": "clipped",
        "label": "clipped",
        "better": None,
        "help": "Share of areas at an end of the range, without any drawing.",
    },
    {
        "key": "shadow",
        "image": "shadow",
        "tolerance": 0.05,
        "label": "shadow",
        "better": "low",
        "help": "Share of light missing in large soft dark places.",
    },
    {
        "key": "blur",
        "image": "blur",
        "tolerance": 0.05,
        "label": "blur",
        "better": "low",
        "help": "Share of steps between pixels that blurring again leaves.",
    },
    {
        "key": "contrast",
        "image": "contrast",
        "label": "contrast",
        "better": None,
        "help": "Standard deviation of the pixels.",
    },
    {
        "key": "colour",
        "image": "colour",
        "label": "colour",
        "better": None,
        "help": "Colourfulness: strong guidance raises it. 0 is grey.",
    },
    {
        "key": "detail",
        "image": "detail",
        "label": "detail",
        "better": None,
        "help": "Share of energy in high frequencies: blur lowers, noise raises it.",
    },
    {
        "key": "diversity",
        "label": "diversity",
        "better": "high",
        "help": "How far the seeds of one prompt differ: 1 is unrelated, 0 is copies.",
    },
]
"""Numbers of a cell. image: the number of its images (index.json) whose mean it is. adherence: whether it says that a
image shows what was asked. needs: who has to look at the images. tolerance: how much worse than with hardly any guidance
selection lets it be (``selection.py``)."""


def check_by(by: str | None, present: set[str]) -> None:
    """Raise UserError for a number to choose by that no sweep gives. present: whoever looks, of "judge" and "clip"."""
    usable = [n["key"] for n in NUMBERS if "image" in n and n["better"] and n.get("needs") in (None, *present)]
    if by is not None and by not in usable:
        found = next((n for n in NUMBERS if n["key"] == by), None)
        if found is None:
            why = "there is no such number"
        elif not found["better"]:
            why = "neither end of it is better"
        elif "image" not in found:
            why = "single images have no such number"
        else:
            why = {"judge": "it needs a judge of digits", "clip": "it needs --clip"}[found["needs"]]
        raise UserError(f"--by {by}: {why}; choose one of {', '.join(usable)}", exit_code=2)
