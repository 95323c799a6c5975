"""Images from a model: prompts, noise and a way of sampling in, images out."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dedistill.errors import amount
from dedistill.flow import keyed
from dedistill.flow.guidance import CONDITIONAL, UNCONDITIONAL, Branch, ClassifierFree, Evaluation, Guider
from dedistill.flow.solvers import SOLVERS, Velocity, sigma_grid, solve
from dedistill.models.conditioning import Conditioning
from dedistill.models.model import Model


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How images are made from noise, whatever the model: a solver of ``SOLVERS``, its steps, and the guidance."""

    solver: str = "euler"
    steps: int
    guidance: Guider = field(default_factory=ClassifierFree)

    @property
    def facts(self) -> dict[str, float | str]:
        """What files keep of it: those of the guider, steps, and a method where that is not Euler's with plain CFG."""
        facts = dict(self.guidance.facts)
        solver = "" if self.solver == "euler" else SOLVERS[self.solver].name
        method = ", ".join(filter(None, (solver, str(facts.pop("method", "")))))
        return {**facts, "steps": self.steps} | ({"method": method} if method else {})

    @property
    def label(self) -> str:
        """What people read of it."""
        return f"{self.guidance.label}, {amount(self.steps, f'{SOLVERS[self.solver].name} step')}"

    def nfe(self, shift: float = 1.0) -> int:
        """Calls of the network that one image costs, on sigmas of that shift."""
        sigmas, evaluations = sigma_grid(self.steps, shift), SOLVERS[self.solver].evaluations
        return sum(len(self.guidance.branches(sigmas, i)) * evaluations(sigmas, i) for i in range(self.steps))


def start_noise(seed: int, count: int, image: tuple[int, ...]) -> Tensor:
    """Noise [count, C, H, W] of a seed: row i is the same whatever the model, scale, steps or count."""
    return keyed.noise(seed, "sample", 0, range(count), tuple(image))


@torch.no_grad()
def sample(model: Model, prompts: list[str], noise: Tensor, sampling: Sampling, *, length: int | None = None) -> Tensor:
    """The final images [B, C, H, W] on the CPU, float32, about [-1, 1].

    noise: [B, C, h, w] as the denoiser sees images. The unconditional branch is the model's negative prompt; a distilled
    guidance embedding is fed ``model.guidance`` besides. length: tokens to pad prompts to; default the model's own.
    """
    states = trajectories(model, prompts, noise, sampling, length=length)
    return torch.cat([model.decode(chunk[-1]) for chunk in states])


@torch.no_grad()
def trajectories(
    model: Model, prompts: list[str], noise: Tensor, sampling: Sampling, *, length: int | None = None
) -> Iterator[list[Tensor]]:
    """Every state of the solver, chunk of prompts by chunk: lists of steps + 1 tensors [b, C, H, W] on the CPU."""
    with model.evaluating():  # which ends also when the caller stops reading early
        negative = model.encode([model.negative], length)
        for start in range(0, len(prompts), model.chunk):
            text = model.encode(prompts[start : start + model.chunk], length)
            texts = {CONDITIONAL: text, UNCONDITIONAL: negative.expand(len(text))}
            yield [s.float().cpu() for s in path(model, texts, noise[start : start + model.chunk], sampling)]


def path(model: Model, texts: Mapping[Branch, Conditioning], noise: Tensor, sampling: Sampling) -> Iterator[Tensor]:
    """Every state of the solver [B, C, h, w] on the model's device, from ``noise`` on. texts: [B] of prompts and of negative
    ones, under ``CONDITIONAL`` and ``UNCONDITIONAL``.

    Two branches are two calls: each is trimmed to its own length and needs no mask when its prompts are alike.
    """
    sigmas = sigma_grid(sampling.steps, model.grid_shift)
    return solve(sampling.solver, guided(model, texts, sigmas, sampling.guidance), noise.to(model.device), sigmas)


def guided(model: Model, texts: Mapping[Branch, Conditioning], sigmas: np.ndarray, guider: Guider) -> Velocity:
    """The velocity that ``guider`` makes of the model's on one path along ``sigmas``. texts: as ``path`` takes them."""
    memory: dict[int, Tensor] = {}

    def velocity(noisy: Tensor, sigma: float, i: int) -> Tensor:
        s, outputs = torch.full((len(noisy),), sigma, device=noisy.device), {}
        for branch in guider.branches(sigmas, i):
            with model.as_asked(branch):
                outputs[branch] = model.velocity(noisy, s, texts[Branch(prompt=branch.prompt)], model.guidance)
        return guider.combine(outputs, Evaluation(noisy, sigma, sigmas, i, memory))

    return velocity
