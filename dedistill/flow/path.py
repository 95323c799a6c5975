"""The straight path between data and noise: where on it training looks, every conversion along it, and the loss on it.

B is the batch, ... the dimensions of one sample. sigma is [B] in [0, 1]; 1 is noise, 0 is data (Esser et al. 2024,
arXiv 2403.03206, eq. 1 with t = sigma).
"""

import math
from collections.abc import Callable

import numpy as np
from torch import Tensor

from dedistill.flow import keyed

# --- from a uniform draw to sigma: strata, density, shift, all in float64 ----------------------------------------------
#
# Densities are inverse CDFs, increasing in p, so one stratified p serves them all.


MODE_SCALE_MAX = 2 / (math.pi - 2)  # beyond it the map is no longer monotone (arXiv 2403.03206, sec. 3.1)


def logit_normal(p: np.ndarray, mean: float, std: float) -> np.ndarray:
    """logit(sigma) ~ N(mean, std^2): sigmoid(mean + std Phi^-1(p)) (arXiv 2403.03206, eq. 19)."""
    from scipy import special  # here, as below: most runs draw by other densities

    return special.expit(mean + std * special.ndtri(p))


def beta(p: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    """sigma ~ Beta(alpha, beta). alpha > beta leans towards noise."""
    from scipy import special

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


def u_shaped(p: np.ndarray, alpha: float) -> np.ndarray:
    """Density proportional to cosh(alpha (sigma - 1/2)): both ends are as likely, cosh(alpha / 2) times as much as the middle
    (arXiv 2405.20320, sec. 4.2: alpha 4)."""
    return 0.5 + np.arcsinh((2 * np.asarray(p, dtype=np.float64) - 1) * math.sinh(alpha / 2)) / alpha


DENSITIES: dict[str, Callable[..., np.ndarray]] = {
    "uniform": np.asarray,
    "logit_normal": logit_normal,
    "beta": beta,
    "mode": mode,
    "cosmap": cosmap,
    "u_shaped": u_shaped,
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


# --- the straight path between data and noise, and every conversion along it -----------------------------------------


DIFFERENT = "data {} and noise {} differ in shape"


def expand(sigma: Tensor, like: Tensor) -> Tensor:
    """sigma [B] shaped [B, 1, ...] so that it multiplies ``like`` [B, ...]."""
    if sigma.ndim != 1 or sigma.shape[0] != like.shape[0]:
        raise ValueError(f"sigma has shape {tuple(sigma.shape)}; a batch of {like.shape[0]} needs ({like.shape[0]},)")
    return sigma.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def interpolate(data: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """The noisy sample (1 - sigma) data + sigma noise, [B, ...]."""
    if data.shape != noise.shape:
        raise ValueError(DIFFERENT.format(tuple(data.shape), tuple(noise.shape)))
    s = expand(sigma, data)
    return (1 - s) * data + s * noise


def velocity(data: Tensor, noise: Tensor) -> Tensor:
    """d noisy / d sigma along the straight path: noise - data."""
    if data.shape != noise.shape:
        raise ValueError(DIFFERENT.format(tuple(data.shape), tuple(noise.shape)))
    return noise - data


def denoised(noisy: Tensor, sigma: Tensor, v: Tensor) -> Tensor:
    """The data that ``noisy`` came from if ``v`` is its velocity: noisy - sigma v."""
    return noisy - expand(sigma, noisy) * v


def implied_noise(noisy: Tensor, sigma: Tensor, v: Tensor) -> Tensor:
    """The noise that ``noisy`` came from if ``v`` is its velocity: noisy + (1 - sigma) v."""
    return noisy + (1 - expand(sigma, noisy)) * v


def velocity_from_denoised(noisy: Tensor, sigma: Tensor, data: Tensor) -> Tensor:
    """The velocity that points from ``data`` through ``noisy``: (noisy - data) / sigma. sigma > 0."""
    if seen_anywhere(sigma <= 0):
        raise ValueError("sigma = 0 has no direction: the noisy sample is the data itself")
    return (noisy - data) / expand(sigma, noisy)


def velocity_from_noise(noisy: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """The velocity that points from ``noisy`` to ``noise``: (noise - noisy) / (1 - sigma). sigma < 1."""
    if seen_anywhere(sigma >= 1):
        raise ValueError("sigma = 1 has no direction: the noisy sample is the noise itself")
    return (noise - noisy) / (1 - expand(sigma, noisy))


# --- the flow-matching loss, one number per sample -------------------------------------------------------------------


def flow_loss(predicted: Tensor, target: Tensor, huber: float | None = None) -> Tensor:
    """Mean squared error over each sample's elements, in float32: [B, ...] -> [B] (arXiv 2210.02747, eq. 9).

    huber: c of :func:`pseudo_huber`, which is taken of it.
    """
    if predicted.shape != target.shape:
        raise ValueError(f"prediction {tuple(predicted.shape)} and target {tuple(target.shape)} differ in shape")
    error = (predicted.float() - target.float()).square().flatten(1).mean(1)
    return error if huber is None else pseudo_huber(error, huber)


def pseudo_huber(error: Tensor, c: float) -> Tensor:
    """sqrt(error + c^2) - c of mean squared errors [B]: error / 2c far below c^2, the root of error far above."""
    return error / ((error + c * c).sqrt() + c)  # no small difference of large numbers


def seen_anywhere(condition: Tensor) -> bool:
    """Whether ``condition`` is True anywhere, for checks of what is passed in. False on a GPU: it is not waited for to look."""
    return condition.device.type == "cpu" and bool(condition.any())
