"""Networks that predict something else than a velocity, made to predict one. Exact, on the straight path.

A noisy sample z = (1 - t) x0 + t e of our path is a variance-preserving sample x = a x0 + b e up to its scale: x = z / r with
r = sqrt((1 - t)^2 + t^2), a = (1 - t) / r, b = t / r. Then a DDIM step of the one is an Euler step of the other (tested).
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from dedistill.flow.path import expand, seen_anywhere

Prediction = Literal["velocity", "epsilon", "v", "x0"]
"""noise - data; the noise; a noise - b data of the variance-preserving sample (arXiv 2202.00512); the data."""


def variance_preserving(noisy: Tensor, sigma: Tensor) -> Tensor:
    """``noisy`` [B, ...] of the straight path as a network of the variance-preserving one takes it: noisy / r(sigma)."""
    return noisy / _norm(sigma, noisy)


def to_velocity(kind: Prediction, predicted: Tensor, noisy: Tensor, sigma: Tensor, highest: float = 1.0) -> Tensor:
    """noise - data, float32, of what a network predicts for ``noisy`` [B, ...] at ``sigma`` [B].

    highest: the largest sigma that the network knows, less than 1 where it predicts noise. Above it the network must have
    been asked at ``highest``: the data that it then sees in the sample give the direction, which stays finite at sigma = 1.
    """
    predicted, noisy = predicted.float(), noisy.float()
    return _KINDS[kind](predicted, noisy, expand(sigma, noisy), expand(sigma.clamp(max=highest), noisy))


def _of_velocity(v: Tensor, noisy: Tensor, t: Tensor, known: Tensor) -> Tensor:
    return v


def _of_noise(noise: Tensor, noisy: Tensor, t: Tensor, known: Tensor) -> Tensor:
    if seen_anywhere(known >= 1):
        raise ValueError("at sigma = 1 noise says nothing of the data: a network that predicts it has a highest sigma")
    data = (noisy - known * noise) / (1 - known)
    return torch.where(t <= known, (noise - noisy) / (1 - known), (noisy - data) / t.clamp(min=1e-12))


def _of_v(v: Tensor, noisy: Tensor, t: Tensor, known: Tensor) -> Tensor:
    r = ((1 - known) ** 2 + known**2).sqrt()
    a, b = (1 - known) / r, known / r
    data = a * (noisy / r) - b * v
    return torch.where(t <= known, (b - a) * (noisy / r) + (a + b) * v, (noisy - data) / t.clamp(min=1e-12))


def _of_data(data: Tensor, noisy: Tensor, t: Tensor, known: Tensor) -> Tensor:
    if seen_anywhere(t <= 0):
        raise ValueError("sigma = 0 has no direction: the noisy sample is the data itself")
    return (noisy - data) / t


def _norm(sigma: Tensor, like: Tensor) -> Tensor:
    t = expand(sigma, like)
    return ((1 - t) ** 2 + t**2).sqrt()


_KINDS: dict[Prediction, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "velocity": _of_velocity,
    "epsilon": _of_noise,
    "v": _of_v,
    "x0": _of_data,
}
