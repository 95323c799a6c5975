"""The straight path between data and noise, every conversion along it, and the loss on it.

B is the batch, ... the dimensions of one sample. sigma is [B] in [0, 1]; 1 is noise, 0 is data (Esser et al. 2024,
arXiv 2403.03206, eq. 1 with t = sigma).
"""

from torch import Tensor

DIFFERENT = "data {} and noise {} differ in shape"

# --- the straight path between data and noise, and every conversion along it -----------------------------------------


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


def flow_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over each sample's elements, in float32: [B, ...] -> [B] (arXiv 2210.02747, eq. 9)."""
    if predicted.shape != target.shape:
        raise ValueError(f"prediction {tuple(predicted.shape)} and target {tuple(target.shape)} differ in shape")
    return (predicted.float() - target.float()).square().flatten(1).mean(1)


def seen_anywhere(condition: Tensor) -> bool:
    """Whether ``condition`` is True anywhere, for checks of what is passed in. False on a GPU: it is not waited for to look."""
    return condition.device.type == "cpu" and bool(condition.any())
