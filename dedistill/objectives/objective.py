"""From the slots of a step to one loss per sample.

Three objectives, one loop: they differ in where the noisy sample, sigma and target come from.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dedistill.data.source import Batch, Source
from dedistill.distributed.world import World, deal
from dedistill.errors import UserError
from dedistill.flow import keyed, timesteps
from dedistill.flow.path import flow_loss, interpolate, velocity
from dedistill.models.conditioning import Conditioning
from dedistill.models.model import Model
from dedistill.recipe import Recipe


@dataclass(frozen=True)
class Task:
    """What the network is asked: velocity at ``noisy`` [B, C, H, W], ``sigma`` [B], given captions."""

    noisy: Tensor
    sigma: Tensor
    target: Tensor
    captions: list[str]
    dropped: Tensor
    """[B] bool: the caption is replaced by the empty prompt."""
    names: list[str]
    text: Conditioning | None = None
    """The captions, where they are encoded already."""


class Objective:
    """The questions of every step of a run, each a pure function of (seed, step, position)."""

    def __init__(self, recipe: Recipe, source: Source, shift_of: Callable[[tuple[int, ...]], float]):
        """shift_of: the family's shift for samples of a shape, used where the recipe says shift = "auto"."""
        t = recipe.timesteps
        self.kind, self.seed, self.batch, self.source = recipe.train.objective, recipe.run.seed, recipe.train.batch, source
        given = {k: getattr(t, k) for k in ("alpha", "beta", "mean", "std", "scale")}
        self.shift_of = lambda shape: t.resolved_shift(shift_of(shape))
        self.sampling = {
            "density": t.density,
            "params": {k: v for k, v in given.items() if v is not None},
            "stratify": t.stratify,
        }
        self.dropout = recipe.data.caption_dropout

    def micro_batches(self, step: int, size: int) -> list[np.ndarray]:
        """All positions of a step in parts of at most ``size`` that share a shape."""
        return _cut(self.source.groups(self.seed, step, np.arange(self.batch), self.batch), size)

    def share(self, step: int, size: int, world: World) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """(those of the step's micro-batches that are this process's, those that it only keeps the others company with).

        Over all processes the first are all, and none twice. The second are empty unless all must run equally many
        passes; then they are the least work of the step, as often as it takes.
        """
        parts = self.micro_batches(step, size)
        work = [self.source.work(self.seed, step, part, self.batch) for part in parts]
        dealt = deal(work, world.size)
        own = [parts[i] for i in dealt[world.rank]]
        missing = max(map(len, dealt)) - len(own) if world.lockstep else 0
        return own, [parts[work.index(min(work))]] * missing

    def task(self, step: int, positions: np.ndarray) -> Task:
        """The training task of ``positions`` in ``step``."""
        batch = self.source.draw(self.seed, step, positions, self.batch)
        dropped = keyed.uniforms(self.seed, "caption-dropout", step, self.batch)[positions] < self.dropout
        if self.kind == "distill":
            p = timesteps.probabilities(self.seed, "sigma", step, self.batch, self.sampling["stratify"])[positions]
            return _window_task(batch, p, torch.from_numpy(dropped))
        noise = self._noise(batch, "noise", step, positions)
        shift = self.shift_of(tuple(batch.pixels.shape[1:]))
        sigma = timesteps.draw(self.seed, step, self.batch, shift=shift, **self.sampling)[positions]
        return _flow_task(batch, noise, sigma, torch.from_numpy(dropped))

    def held_out(self, count: int, size: int, world: World | None = None) -> list[Task]:
        """Fixed tasks on ``count`` held-out samples, at most ``size`` in each, in all the same whatever the size.

        Their sigmas stand in the middle of equal intervals, whatever the training density. Of several processes each
        gets its share of the tasks.
        """
        world = world or World()
        parts = _cut(self.source.groups(self.seed, 0, np.arange(count), count, held_out=True), size)
        work = [self.source.work(self.seed, 0, part, count, held_out=True) for part in parts]
        p = timesteps.midpoints(self.seed, count)
        own = [parts[i] for i in deal(work, world.size)[world.rank]]
        return [self._held_out(part, p[part], count) for part in own]

    def _held_out(self, positions: np.ndarray, p: np.ndarray, count: int) -> Task:
        batch = self.source.draw(self.seed, 0, positions, count, held_out=True)
        dropped = torch.zeros(len(positions), dtype=torch.bool)
        if self.kind == "distill":
            return _window_task(batch, p, dropped)
        return _flow_task(batch, self._noise(batch, "validation/noise", 0, positions), p, dropped)

    def _noise(self, batch: Batch, purpose: str, step: int, positions: np.ndarray) -> Tensor:
        if self.kind == "reflow":  # the picture belongs to this very noise; another one would teach nothing
            return batch.noise
        return keyed.noise(self.seed, purpose, step, positions, tuple(batch.pixels.shape[1:]))


def _cut(groups: list[np.ndarray], size: int) -> list[np.ndarray]:
    return [group[i : i + size] for group in groups for i in range(0, len(group), size)]


def _flow_task(batch: Batch, noise: Tensor, sigma: np.ndarray, dropped: Tensor) -> Task:
    s = torch.from_numpy(sigma.astype(np.float32))
    noisy = interpolate(batch.pixels, noise, s)
    return Task(noisy, s, velocity(batch.pixels, noise), batch.captions, dropped, batch.names, batch.text)


def _window_task(batch: Batch, p: np.ndarray, dropped: Tensor) -> Task:
    """Mean velocity of the teacher between two stored points, asked at the first: a student of as many steps."""
    windows = batch.trajectory.shape[1] - 1
    if windows < 1:
        raise UserError("data.path: these pairs store no trajectory points to distil from")
    k = np.minimum((p * windows).astype(int), windows - 1)
    rows = torch.arange(len(k))
    here, there = batch.trajectory[rows, k], batch.trajectory[rows, k + 1]
    sigmas = torch.from_numpy(batch.trajectory_sigmas.astype(np.float32))
    width = (sigmas[k + 1] - sigmas[k]).reshape(-1, 1, 1, 1)
    return Task(here, sigmas[k], (there - here) / width, batch.captions, dropped, batch.names, batch.text)


def task_loss(model: Model, task: Task) -> Tensor:
    """The loss of each sample [B], float32, on the model's device."""
    text = model.encode(task.captions) if task.text is None else task.text.to(model.device)
    if task.dropped.any():
        text = text.where(task.dropped.to(model.device), model.encode([""]))
    predicted = model.velocity(task.noisy.to(model.device), task.sigma.to(model.device), text)
    return flow_loss(predicted, task.target.to(model.device))
