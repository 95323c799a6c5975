"""Solving d noisy / d sigma = velocity from noise to data."""

import math
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
from torch import Tensor

from dedistill.flow.path import shift_sigma

Velocity = Callable[[Tensor, float, int], Tensor]
"""(noisy [B, ...], sigma, index of the step) -> velocity [B, ...]"""


class Solver(Protocol):
    """One path from noise to data: a new instance for each, so that it may remember earlier steps."""

    name: str

    @staticmethod
    def evaluations(sigmas: np.ndarray, i: int) -> int:
        """Of the velocity, in step ``i``."""

    def step(self, noisy: Tensor, velocity: Velocity, sigmas: np.ndarray, i: int) -> Tensor:
        """The state at ``sigmas[i + 1]`` from ``noisy`` [B, ...] at ``sigmas[i]``."""


class OncePerStep:
    """A solver that asks for the velocity once in each step, where the step begins."""

    @staticmethod
    def evaluations(sigmas: np.ndarray, i: int) -> int:
        return 1


class Euler(OncePerStep):
    """Of first order; exact where paths are straight."""

    name = "Euler"

    def step(self, noisy: Tensor, velocity: Velocity, sigmas: np.ndarray, i: int) -> Tensor:
        return noisy + float(sigmas[i + 1] - sigmas[i]) * velocity(noisy, float(sigmas[i]), i)


class Heun:
    """The trapezoidal rule, of second order, with Euler's last step: at sigma = 0 no network was trained (arXiv 2206.00364,
    algorithm 1)."""

    name = "Heun"

    @staticmethod
    def evaluations(sigmas: np.ndarray, i: int) -> int:
        return 2 if sigmas[i + 1] > 0 else 1

    def step(self, noisy: Tensor, velocity: Velocity, sigmas: np.ndarray, i: int) -> Tensor:
        here, there = map(float, sigmas[i : i + 2])
        first = velocity(noisy, here, i)
        if there == 0:
            return noisy - here * first
        second = velocity(noisy + (there - here) * first, there, i)
        return noisy + (there - here) / 2 * (first + second)


def log_snr(sigma: float) -> float:
    """Half the logarithm of the signal-to-noise ratio, ln((1 - sigma) / sigma): -inf in pure noise, inf in pure data.

    The solvers below extrapolate along it: there noise falls by the same factor everywhere.
    """
    return math.inf if sigma <= 0 else -math.inf if sigma >= 1 else math.log1p(-sigma) - math.log(sigma)


class DPMSolver(OncePerStep):
    """DPM-Solver++(2M), of second order: the data that velocities point from, extrapolated from two steps (arXiv 2211.01095,
    algorithm 2).

    Of first order where the log SNR is infinite: in the step from pure noise, in the one after it, and in that to pure data.
    """

    name = "DPM-Solver++(2M)"

    def __init__(self) -> None:
        self.last: Tensor | None = None
        """The data of the step before."""
        self.change: Tensor | float = 0.0
        """How much the data change in the step before, as far as was known when it was made."""

    def step(self, noisy: Tensor, velocity: Velocity, sigmas: np.ndarray, i: int) -> Tensor:
        here = float(sigmas[i])
        return self._predicted(noisy, noisy - here * velocity(noisy, here, i), sigmas, i)

    def _predicted(self, noisy: Tensor, data: Tensor, sigmas: np.ndarray, i: int) -> Tensor:
        here, there = map(float, sigmas[i : i + 2])
        self.change, before, self.last = 0.0, self.last, data
        if before is not None and there > 0:
            self.change = (data - before) / _widths(sigmas, i)
        return _mixed(noisy, data + self.change / 2, here, there)


class UniPC(DPMSolver):
    """UniPC-2 with B2(h), predicting data (arXiv 2302.04867, algorithms 5 to 8): DPM-Solver++(2M), which at each step first
    corrects the state that it starts from, by the data seen there. No more evaluations than without."""

    name = "UniPC"

    def __init__(self) -> None:
        super().__init__()
        self.start: Tensor | None = None
        """The corrected state at the sigma before."""

    def step(self, noisy: Tensor, velocity: Velocity, sigmas: np.ndarray, i: int) -> Tensor:
        data = noisy - float(sigmas[i]) * velocity(noisy, float(sigmas[i]), i)
        if self.start is not None and self.last is not None:
            noisy = self._corrected(self.start, self.last, data, sigmas, i - 1)
        self.start = noisy
        return self._predicted(noisy, data, sigmas, i)

    def _corrected(self, noisy: Tensor, last: Tensor, data: Tensor, sigmas: np.ndarray, i: int) -> Tensor:
        """Step ``i`` again, now that not only the data ``last`` at its start are known, but also ``data`` at its end."""
        here, there = map(float, sigmas[i : i + 2])
        if i == 0:
            return _mixed(noisy, last + (data - last) / 2, here, there)
        width = log_snr(there) - log_snr(here)
        share = -math.expm1(-width)
        # the two weights solve [[1, 1], [-_widths, 1]] w = [first, second]
        first, second = 1 / share - 1 / width, 1 / share - 2 / (share * width) + 2 / width**2
        of_change = (first - second) / (1 + _widths(sigmas, i))
        return _mixed(noisy, last + of_change * self.change + (first - of_change) * (data - last), here, there)


def _mixed(noisy: Tensor, data: Tensor, here: float, there: float) -> Tensor:
    """The state at ``there`` on the straight path from ``noisy`` at ``here`` to ``data``: exact for data that do not change."""
    return there / here * noisy + (1 - there / here) * data


def _widths(sigmas: np.ndarray, i: int) -> float:
    """The width of step ``i`` - 1 as a multiple of that of step ``i``, in log SNR."""
    before, here, there = (log_snr(float(s)) for s in sigmas[i - 1 : i + 2])
    return (here - before) / (there - here)


SOLVERS: dict[str, type[Solver]] = {"euler": Euler, "heun": Heun, "dpmpp_2m": DPMSolver, "unipc": UniPC}
"""By the names that recipes and files use."""


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
