"""RF-inversion: from an image to noise that gives it back, and again to images near it (Rout et al. 2024, arXiv 2410.10792).

Both ways follow a velocity that is drawn, by a share, to the straight line which ends in a given place.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dedistill.flow.path import velocity_from_denoised, velocity_from_noise
from dedistill.flow.solvers import Velocity, solve


def inverted(velocity: Velocity, data: Tensor, noise: Tensor, sigmas: np.ndarray, gamma: float) -> Tensor:
    """The state at ``sigmas[0]`` that ``data`` [B, ...] come from: Euler's steps along the rising ``sigmas``, which are
    given falling to 0, with v + gamma ((noise - z) / (1 - sigma) - v) (eq. 8).

    gamma = 0 is the model's own path, whose noise may be unlike any that it was trained on; 1 is the straight line to
    ``noise``, for which the model is not called.
    """
    drawn = _drawn(velocity, lambda z, sigma: velocity_from_noise(z, sigma, noise), lambda i: gamma)
    *_, state = solve("euler", drawn, data, sigmas[::-1])
    return state


def edited(
    solver: str, velocity: Velocity, state: Tensor, data: Tensor, sigmas: np.ndarray, eta: Callable[[int], float]
) -> Tensor:
    """What becomes of ``state`` [B, ...] at ``sigmas[0]`` along the falling ``sigmas``, with v + eta ((z - data) / sigma - v)
    (eq. 15).

    eta: by step. 0 is plain sampling; 1 leads straight to ``data``, for which the model is not called.
    """
    drawn = _drawn(velocity, lambda z, sigma: velocity_from_denoised(z, sigma, data), eta)
    *_, found = solve(solver, drawn, state, sigmas)
    return found


def _drawn(velocity: Velocity, line: Callable[[Tensor, Tensor], Tensor], share: Callable[[int], float]) -> Velocity:
    def drawn(noisy: Tensor, sigma: float, i: int) -> Tensor:
        if (own := share(i)) == 0:
            return velocity(noisy, sigma, i)
        straight = line(noisy, torch.full((len(noisy),), sigma, dtype=noisy.dtype, device=noisy.device))
        if own == 1:
            return straight
        v = velocity(noisy, sigma, i)
        return v + own * (straight - v)

    return drawn
