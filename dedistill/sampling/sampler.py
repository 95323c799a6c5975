"""Pictures from a model: prompts and noise in, Euler steps with classifier-free guidance, pictures out."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from dedistill.flow import keyed
from dedistill.flow.guidance import classifier_free, needs_unconditional
from dedistill.flow.solvers import Velocity, euler
from dedistill.models.conditioning import Conditioning
from dedistill.models.model import Model


def start_noise(seed: int, count: int, picture: tuple[int, ...]) -> Tensor:
    """Noise [count, C, H, W] of a seed: row i is the same whatever the model, scale, steps or count."""
    return keyed.noise(seed, "sample", 0, range(count), tuple(picture))


@torch.no_grad()
def sample(
    model: Model,
    prompts: list[str],
    noise: Tensor,
    sigmas: np.ndarray,
    *,
    cfg: float = 1.0,
    skip: int = 0,
    length: int | None = None,
) -> Tensor:
    """The final pictures [B, C, H, W] on the CPU, float32, about [-1, 1].

    noise: [B, C, h, w] as the denoiser sees pictures. sigmas: falling from 1 to 0, len(sigmas) - 1 steps. cfg: guidance
    scale against the model's negative prompt; the first ``skip`` steps run without. A distilled guidance embedding is fed
    ``model.guidance`` besides. length: tokens to pad prompts to; default the model's own.
    """
    states = trajectories(model, prompts, noise, sigmas, cfg=cfg, skip=skip, length=length)
    return torch.cat([model.decode(chunk[-1]) for chunk in states])


@torch.no_grad()
def trajectories(
    model: Model, prompts: list[str], noise: Tensor, sigmas: np.ndarray, *, cfg: float, skip: int = 0, length: int | None = None
) -> Iterator[list[Tensor]]:
    """Every state of the solver, chunk of prompts by chunk: lists of len(sigmas) tensors [b, C, H, W] on the CPU."""
    training = model.root.training
    model.root.eval()
    try:
        negative = model.encode([model.negative], length)
        for start in range(0, len(prompts), model.chunk):
            text = model.encode(prompts[start : start + model.chunk], length)
            velocity = guided(model, text, negative.expand(len(text)), cfg, skip)
            here = noise[start : start + model.chunk].to(model.device)
            yield [state.float().cpu() for state in euler(velocity, here, sigmas)]
    finally:  # also when the caller stops reading early
        model.root.train(training)


def guided(model: Model, text: Conditioning, negative: Conditioning, cfg: float, skip: int) -> Velocity:
    """The velocity of ``text`` [B] steered away from ``negative`` [B] at scale ``cfg``, from solver step ``skip`` on.

    The two branches are two calls: each is trimmed to its own length and needs no mask when its prompts are alike.
    """

    def velocity(noisy: Tensor, sigma: float, index: int) -> Tensor:
        s = torch.full((len(noisy),), sigma, device=noisy.device)
        conditional = model.velocity(noisy, s, text, model.guidance)
        if not needs_unconditional(cfg, index, skip):
            return conditional
        return classifier_free(conditional, model.velocity(noisy, s, negative, model.guidance), cfg)

    return velocity
