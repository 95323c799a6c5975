"""From a uniform draw to sigma: strata, density, shift. All in float64.

Densities are inverse CDFs, increasing in p, so one stratified p serves them all. sigma = 1 is noise.
"""

import math
from collections.abc import Callable

import numpy as np
from scipy import special

from dedistill.flow import keyed

MODE_SCALE_MAX = 2 / (math.pi - 2)  # beyond it the map is no longer monotone (arXiv 2403.03206, sec. 3.1)


def logit_normal(p: np.ndarray, mean: float, std: float) -> np.ndarray:
    """logit(sigma) ~ N(mean, std^2): sigmoid(mean + std Phi^-1(p)) (arXiv 2403.03206, eq. 19)."""
    return special.expit(mean + std * special.ndtri(p))


def beta(p: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    """sigma ~ Beta(alpha, beta). alpha > beta leans towards noise."""
    return special.betaincinv(alpha, beta, p)


def mode(p: np.ndarray, scale: float) -> np.ndarray:
    """Mode sampling with heavy tails (arXiv 2403.03206, eq. 20), -1 <= scale <= 2 / (pi - 2)."""
    if not -1 <= scale <= MODE_SCALE_MAX:
        raise ValueError(f"scale = {scale} is outside [-1, {MODE_SCALE_MAX:.4f}], where the map is monotone")
    u = 1 - np.asarray(p, dtype=np.float64)  # the paper's map falls in u; an inverse CDF rises
    return 1 - u - scale * (np.cos(math.pi / 2 * u) ** 2 - 1 + u)


def cosmap(p: np.ndarray) -> np.ndarray:
    """CosMap (arXiv 2403.03206, eq. 21): 1 - 1 / (tan(pi p / 2) + 1)."""
    return 1 - 1 / (np.tan(math.pi / 2 * np.asarray(p, dtype=np.float64)) + 1)


DENSITIES: dict[str, Callable[..., np.ndarray]] = {
    "uniform": np.asarray,
    "logit_normal": logit_normal,
    "beta": beta,
    "mode": mode,
    "cosmap": cosmap,
}
"""p [batch] and the density's own parameters, by name -> sigma [batch]."""


def shift_sigma(sigma: np.ndarray, shift: float) -> np.ndarray:
    """sigma' = s sigma / (1 + (s - 1) sigma), i.e. logit(sigma') = logit(sigma) + ln s (arXiv 2403.03206, eq. 23)."""
    if not shift > 0:
        raise ValueError(f"shift = {shift} must be positive; 1 leaves sigma as it is")
    return shift * sigma / (1 + (shift - 1) * sigma)


def dynamic_shift(
    tokens: int, base: float = 0.5, maximum: float = 1.15, base_tokens: int = 256, max_tokens: int = 4096
) -> float:
    """FLUX.1-dev's shift exp(mu), mu linear in the number of image tokens. ai-toolkit uses maximum = 1.16."""
    slope = (maximum - base) / (max_tokens - base_tokens)
    return math.exp(base + slope * (tokens - base_tokens))


def probabilities(seed: int, purpose: str, step: int, batch: int, stratify: bool) -> np.ndarray:
    """p [batch] in (0, 1) for every slot of a step, the same on every device.

    Stratified, each of ``batch`` equal intervals holds exactly one p; which slot gets which interval is a keyed
    permutation, so no device and no place in the batch is bound to a band of noise.
    """
    u = keyed.uniforms(seed, purpose, step, batch)
    if not stratify:
        return u
    return (keyed.generator(seed, f"{purpose}/strata", step).permutation(batch) + u) / batch


def midpoints(seed: int, count: int) -> np.ndarray:
    """One sigma in the middle of each of ``count`` equal intervals, in a fixed keyed order: for validation."""
    return (keyed.generator(seed, "validation/strata", 0).permutation(count) + 0.5) / count
