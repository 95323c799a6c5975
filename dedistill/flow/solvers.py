"""Solving d noisy / d sigma = velocity from noise to data."""

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
from torch import Tensor

from dedistill.flow.timesteps import shift_sigma

Velocity = Callable[[Tensor, float, int], Tensor]
"""(noisy [B, ...], sigma, index of the step) -> velocity [B, ...]"""


class Solver(Protocol):
    """One path from noise to data: a new instance for each, so that it may remember earlier steps."""

    name: str
    evaluations: int
    """Of the velocity, in each step."""

    def step(self, noisy: Tensor, velocity: Velocity, sigmas: np.ndarray, i: int) -> Tensor:
        """The state at ``sigmas[i + 1]`` from ``noisy`` [B, ...] at ``sigmas[i]``."""


class Euler:
    name = "Euler"
    evaluations = 1

    def step(self, noisy: Tensor, velocity: Velocity, sigmas: np.ndarray, i: int) -> Tensor:
        return noisy + float(sigmas[i + 1] - sigmas[i]) * velocity(noisy, float(sigmas[i]), i)


SOLVERS: dict[str, type[Solver]] = {"euler": Euler}
"""By the names that files keep."""


def sigma_grid(steps: int, shift: float = 1.0) -> np.ndarray:
    """steps + 1 sigmas: ``linspace(1, 1/steps, steps)`` shifted, then 0, as diffusers' FLUX pipeline makes them."""
    if steps < 1:
        raise ValueError(f"steps = {steps}: a solver needs at least one")
    return np.append(shift_sigma(np.linspace(1, 1 / steps, steps), shift), 0.0)


def solve(solver: str, velocity: Velocity, noise: Tensor, sigmas: np.ndarray) -> Iterator[Tensor]:
    """Each state of the ``solver`` of that name, the noise first and the data last: len(sigmas) tensors."""
    path, noisy = SOLVERS[solver](), noise
    yield noisy
    for i in range(len(sigmas) - 1):
        noisy = path.step(noisy, velocity, sigmas, i)
        yield noisy
