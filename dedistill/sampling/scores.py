"""Numbers of single pictures that need no judge: what goes wrong when guidance is too strong."""

import numpy as np
from torch import Tensor

from dedistill.sampling.artefacts import artefacts

SATURATION_LIMIT = 1.1
"""Beyond this magnitude a pixel of a [-1, 1] picture is burnt, not just at the edge."""


def picture_numbers(pictures: Tensor) -> dict[str, np.ndarray]:
    """Per picture [B], from pictures [B, C, H, W] before they are clamped.

    saturated: share of pixels beyond +-1.1. contrast: standard deviation. detail; and ``artefacts``' of them clamped.
    """
    x = np.nan_to_num(pictures.double().numpy(), nan=0.0, posinf=9.0, neginf=-9.0)
    found = {"saturated": (np.abs(x) > SATURATION_LIMIT).mean((1, 2, 3)), "contrast": x.std((1, 2, 3)), "detail": detail(x)}
    return found | artefacts(pictures)


def detail(x: np.ndarray) -> np.ndarray:
    """Share of the spectrum's energy (without the mean) in the upper half of the frequencies; noise raises it."""
    spectrum = np.abs(np.fft.fft2(x - x.mean((2, 3), keepdims=True))) ** 2
    fy, fx = np.fft.fftfreq(x.shape[2])[:, None], np.fft.fftfreq(x.shape[3])[None]
    high = np.maximum(np.abs(fy), np.abs(fx)) > 0.25
    return (spectrum * high).sum((1, 2, 3)) / np.maximum(spectrum.sum((1, 2, 3)), 1e-12)
