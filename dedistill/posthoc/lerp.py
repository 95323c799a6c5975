"""The LERP chain of LibreFLUX: ema <- (1 - alpha) ema + alpha checkpoint, over all snapshots, for many alphas at once.

alpha is the weight of the *new* checkpoint, so alpha = .9 is nine tenths the last snapshot. A chain is a fixed linear
combination of its inputs.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dedistill.errors import UserError
from dedistill.posthoc.stream import Average

ALPHAS = (0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.975, 0.99, 0.995, 0.999)
"""The ten of the LibreFLUX model card."""


def chain_weights(alpha: float, count: int) -> np.ndarray:
    """Weight of each of ``count`` checkpoints, oldest first, float64: (1-a)^(n-1), a(1-a)^(n-2), ..., a. They add up to 1."""
    if not 0 < alpha <= 1:
        raise UserError(f"alpha = {alpha}: the weight of the newer checkpoint lies in (0, 1]", exit_code=2)
    age = np.arange(count - 1, -1, -1, dtype=np.float64)
    weights = alpha * (1 - alpha) ** age
    weights[0] = (1 - alpha) ** (count - 1)
    return weights


class Spread(NamedTuple):
    """What the weights of an average amount to."""

    effective: float
    """Effective sample size, 1 / sum of w^2."""
    age: float
    """Mean age in steps behind the last snapshot."""
    sigma_rel: float
    """Standard deviation of the steps under the weights, over the last step; comparable with a power-law average's."""


def describe(weights: np.ndarray, steps: Sequence[int]) -> Spread:
    """``weights`` of the snapshots at ``steps``, oldest first."""
    ages = steps[-1] - np.asarray(steps, dtype=np.float64)
    mean = float((weights * ages).sum())
    spread = max(float((weights * (ages - mean) ** 2).sum()), 0.0) ** 0.5
    return Spread(float(1 / np.square(weights).sum()), mean, spread / steps[-1])


def output_name(alpha: float) -> str:
    return f"alpha_linear_{alpha:g}.safetensors"


def chain_averages(alphas: Sequence[float], count: int, out: Path) -> list[Average]:
    """One average in folder ``out`` for each of ``alphas``, over ``count`` snapshots."""
    return [Average(out / output_name(a), chain_weights(a, count), f"lerp alpha={a:g}") for a in alphas]
