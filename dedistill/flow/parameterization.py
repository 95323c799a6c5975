"""Networks that predict something else than a velocity, made to predict one. Exact, on the straight path.

A noisy sample z = (1 - t) x0 + t e of our path is a variance-preserving sample x = a x0 + b e up to its scale: x = z / r with
r = sqrt((1 - t)^2 + t^2), a = (1 - t) / r, b = t / r. Then a DDIM step of the one is an Euler step of the other (tested).
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from dedistill.flow.path import expand, seen_anywhere

Prediction = Literal["velocity", "negative_velocity", "epsilon", "v", "x0"]
"""noise - data; data - noise; the noise; a noise - b data of the variance-preserving sample (arXiv 2202.00512); the data."""


def variance_preserving(noisy: Tensor, sigma: Tensor) -> Tensor:
    """``noisy`` [B, ...] of the straight path as a network of the variance-preserving one takes it: noisy / r(sigma)."""
    return noisy / _norm(sigma, noisy)


def to_velocity(
    kind: Prediction, predicted: Tensor, noisy: Tensor, sigma: Tensor, highest: float = 1.0, seen: Tensor | None = None
) -> Tensor:
    """noise - data, at least float32, of what a network predicts for ``noisy`` [B, ...] at ``sigma`` [B].

    highest: the largest sigma that the network knows, less than 1 where it predicts noise. Above it the network must have
    been asked at ``highest``: the data that it then sees in the sample give the direction, which stays finite at sigma = 1.
    seen: what it was shown as a sample of ``highest`` there, on this path; ``noisy`` itself by default.
    """
    predicted, noisy = _precise(predicted), _precise(noisy)
    asked = noisy if seen is None else _precise(seen)
    return _KINDS[kind](predicted, noisy, expand(sigma, noisy), expand(sigma.clamp(max=highest), noisy), asked)


def diffusion_velocity(
    kind: Prediction, network: Callable[[Tensor], Tensor], noisy: Tensor, sigma: Tensor, highest: float
) -> Tensor:
    """noise - data, at least float32, of a ``network`` that takes variance-preserving samples [B, ...] and knows sigma to
    ``highest``.

    It must tell itself sigma, or ``highest`` above that. There its sample keeps variance 1 (it is noisy / r(sigma)), and the
    data that it sees in it give the direction.
    """
    sample = variance_preserving(noisy, sigma)
    seen = sample * _norm(sigma.clamp(max=highest), noisy)
    return to_velocity(kind, network(sample), noisy, sigma, highest, torch.where(expand(sigma, noisy) <= highest, noisy, seen))


def own_weight(kind: Prediction, sigma: Tensor) -> Tensor:
    """By what |velocity error|^2 at ``sigma`` [B] is to be multiplied to be the |error|^2 of what the network predicts."""
    t = sigma
    one = torch.ones_like(t)
    weights = {"velocity": one, "negative_velocity": one, "epsilon": (1 - t) ** 2, "v": (1 - t) ** 2 + t**2, "x0": t**2}
    return weights[kind]


def min_snr_weight(kind: Prediction, sigma: Tensor, most: float) -> Tensor:
    """Min-SNR weighting (arXiv 2303.09556) of the |error|^2 of what a network predicts, "epsilon" or "v", at ``sigma`` [B]:
    that of its data by the signal-to-noise ratio a^2 / b^2, and by ``most`` where that is larger."""
    ratio = ((1 - sigma) / sigma.clamp(min=1e-12)) ** 2
    return ratio.clamp(max=most) / (ratio + 1 if kind == "v" else ratio)


def _precise(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _of_velocity(v: Tensor, noisy: Tensor, t: Tensor, known: Tensor, seen: Tensor) -> Tensor:
    return v


def _of_noise(noise: Tensor, noisy: Tensor, t: Tensor, known: Tensor, seen: Tensor) -> Tensor:
    if seen_anywhere(known >= 1):
        raise ValueError("at sigma = 1 noise says nothing of the data: a network that predicts it has a highest sigma")
    data = (seen - known * noise) / (1 - known)
    return torch.where(t <= known, (noise - noisy) / (1 - known), (noisy - data) / t.clamp(min=1e-12))


def _of_v(v: Tensor, noisy: Tensor, t: Tensor, known: Tensor, seen: Tensor) -> Tensor:
    r = ((1 - known) ** 2 + known**2).sqrt()
    a, b = (1 - known) / r, known / r
    data = a * (seen / r) - b * v
    return torch.where(t <= known, (b - a) * (noisy / r) + (a + b) * v, (noisy - data) / t.clamp(min=1e-12))


def _of_data(data: Tensor, noisy: Tensor, t: Tensor, known: Tensor, seen: Tensor) -> Tensor:
    if seen_anywhere(t <= 0):
        raise ValueError("sigma = 0 has no direction: the noisy sample is the data itself")
    return (noisy - data) / t


def _norm(sigma: Tensor, like: Tensor) -> Tensor:
    t = expand(sigma, like)
    return ((1 - t) ** 2 + t**2).sqrt()


_KINDS: dict[Prediction, Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "velocity": _of_velocity,
    "negative_velocity": lambda v, *others: -v,
    "epsilon": _of_noise,
    "v": _of_v,
    "x0": _of_data,
}
