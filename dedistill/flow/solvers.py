"""Solving d noisy / d sigma = velocity from noise to data."""

from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
from torch import Tensor

from dedistill.flow.timesteps import shift_sigma

Velocity = Callable[[Tensor, float, int], Tensor]
"""(noisy [B, ...], sigma, index of the step) -> velocity [B, ...]"""


def sigma_grid(steps: int, shift: float = 1.0) -> np.ndarray:
    """steps + 1 sigmas: ``linspace(1, 1/steps, steps)`` shifted, then 0, as diffusers' FLUX pipeline makes them."""
    if steps < 1:
        raise ValueError(f"steps = {steps}: a solver needs at least one")
    return np.append(shift_sigma(np.linspace(1, 1 / steps, steps), shift), 0.0)


def euler(velocity: Velocity, noise: Tensor, sigmas: np.ndarray) -> Iterator[Tensor]:
    """Each state of Euler's method, the noise first and the data last: len(sigmas) tensors."""
    noisy = noise
    yield noisy
    for i, (here, there) in enumerate(pairwise(sigmas)):
        noisy = noisy + float(there - here) * velocity(noisy, float(here), i)
        yield noisy
