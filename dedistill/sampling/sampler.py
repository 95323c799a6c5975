"""Pictures from a model: prompts and noise in, Euler steps with classifier-free guidance, pictures out."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from dedistill.assemble import Model
from dedistill.flow import keyed
from dedistill.flow.guidance import classifier_free, needs_unconditional
from dedistill.flow.solvers import euler

NEGATIVE = ""


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
    """The final pictures [B, C, H, W] on the CPU, float32.

    sigmas: falling from 1 to 0, len(sigmas) - 1 steps. cfg: guidance scale; the first ``skip`` steps run without.
    length: tokens to pad prompts to; default the model's own.
    """
    states = trajectories(model, prompts, noise, sigmas, cfg=cfg, skip=skip, length=length)
    return torch.cat([chunk[-1] for chunk in states])


@torch.no_grad()
def trajectories(
    model: Model, prompts: list[str], noise: Tensor, sigmas: np.ndarray, *, cfg: float, skip: int = 0, length: int | None = None
) -> Iterator[list[Tensor]]:
    """Every state of the solver, chunk of prompts by chunk: lists of len(sigmas) tensors [b, C, H, W] on the CPU."""
    training = model.root.training
    model.root.eval()
    empty = model.encode([NEGATIVE], length)
    try:
        yield from _chunks(model, prompts, noise, sigmas, empty, cfg=cfg, skip=skip, length=length)
    finally:  # also when the caller stops reading early
        model.root.train(training)


def _chunks(model, prompts, noise, sigmas, empty, *, cfg, skip, length) -> Iterator[list[Tensor]]:
    for start in range(0, len(prompts), model.chunk):
        text = model.encode(prompts[start : start + model.chunk], length)
        nothing = empty.expand(len(text))

        def velocity(noisy: Tensor, sigma: float, index: int, text=text, nothing=nothing) -> Tensor:
            s = torch.full((len(noisy),), sigma, device=noisy.device)
            conditional = model.velocity(noisy, s, text)
            if not needs_unconditional(cfg, index, skip):
                return conditional
            return classifier_free(conditional, model.velocity(noisy, s, nothing), cfg)

        here = noise[start : start + model.chunk].to(model.device)
        yield [state.float().cpu() for state in euler(velocity, here, sigmas)]
