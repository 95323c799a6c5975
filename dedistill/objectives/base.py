"""What all objectives share: which samples a step is made of, what is drawn for each, and the loss of what comes of both.

An objective is a file of this folder, named as recipes name it, with a subclass of :class:`Objective`; what a recipe must know
of it stands in ``dedistill/recipe/objectives.py``.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, TypedDict

import numpy as np
import torch
from torch import Tensor

from dedistill.data.source import Batch, Slot, Source, needed
from dedistill.distributed.world import World, partition_by_cost
from dedistill.errors import UserError
from dedistill.flow import keyed
from dedistill.flow.path import DENSITIES, denoised, flow_loss, interpolate, midpoints, probabilities, shift_sigma, velocity
from dedistill.flow.schedule import Schedule
from dedistill.models.conditioning import Conditioning
from dedistill.models.image_prompts import told_own
from dedistill.models.lpips import Lpips
from dedistill.models.model import Model
from dedistill.recipe import Recipe
from dedistill.recipe.schema import shift_in_numbers


@dataclass(frozen=True)
class NoisyBatch:
    """What the network is asked: velocity at ``noisy`` [B, C, H, W], ``sigma`` [B], given captions."""

    noisy: Tensor
    sigma: Tensor
    target: Tensor
    captions: list[str]
    """Empty where dropped."""
    names: list[str]
    image_ids: list[str]
    """What tells the images apart that the samples are of."""
    text: Conditioning | None = None
    """The captions, where they are encoded already."""
    scales: Tensor | None = None
    """[B], of guidance, where the network is fed one in training."""
    part: str = ""
    """Of a mixture, whose samples they are."""

    def pinned(self) -> "NoisyBatch":
        """In memory from which a GPU copies by itself, while it works on what came before."""
        tensors: dict[str, Any] = {name: t.pin_memory() for name, t in vars(self).items() if isinstance(t, Tensor)}
        return replace(self, text=self.text and self.text.each(Tensor.pin_memory), **tensors)

    def conditioning(self, model: Model) -> Conditioning:
        """What its captions are to ``model``, on its device."""
        return model.encode(self.captions) if self.text is None else self.text.to(model.device)


@dataclass(frozen=True)
class Draws:
    """The random numbers of B slots, each a function of (seed, step, position). For validation they are fixed."""

    p: np.ndarray
    """[B] in (0, 1), spread evenly over the slots of a step."""
    sigma: Callable[[tuple[int, ...]], np.ndarray]
    """Shape of a sample -> sigma [B], float64: ``p`` by the recipe's density and shift. For validation ``p`` itself."""
    noise: Callable[[tuple[int, ...]], Tensor]
    """Shape of a sample -> standard normal noise [B, ...]."""
    more: Callable[[], np.ndarray]
    """[B] in (0, 1), independent, for what an objective draws beside."""


class Sigmas(TypedDict):
    """How sigmas are drawn."""

    density: str
    params: dict[str, float]
    stratify: bool


class Objective:
    """The noisy batches of every step of a run, each a pure function of (seed, step, position), and their loss.

    This one is flow matching (arXiv 2210.02747): every sample is mixed with noise at a sigma of the recipe's density, and the
    target is the velocity. Others replace what they do otherwise.
    """

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    """Fields of a :class:`Batch` without which it cannot do, and which not every source fills."""
    known: ClassVar[dict[str, type["Objective"]]] = {}

    def __init_subclass__(cls) -> None:
        if "name" in vars(cls):
            cls.known[cls.name] = cls

    def __init__(
        self, recipe: Recipe, source: Source, shift_of: Callable[[tuple[int, ...]], float], schedule: Schedule | None = None
    ):
        """shift_of: the family's shift for samples of a shape, used where the recipe says shift = "auto". schedule: of a model
        that was trained by diffusion."""
        t = recipe.timesteps
        self.seed, self.batch = recipe.run.seed, recipe.train.batch
        self.take(source)
        self.huber = recipe.train.huber
        self.lpips = Lpips(Path(recipe.train.lpips), recipe.where("train.lpips")) if recipe.train.lpips else None
        self.dropout, self.image_dropout = recipe.data.caption_dropout, recipe.data.image_dropout or 0.0
        given = {k: getattr(t, k) for k in ("alpha", "beta", "mean", "std", "scale")}
        self.shift_of = cache(lambda shape: shift_in_numbers(t.shift, lambda: shift_of(shape)))
        self.sampling: Sigmas = {
            "density": t.density,
            "params": {k: v for k, v in given.items() if v is not None},
            "stratify": t.stratify,
        }

    def take(self, source: Source) -> None:
        """Samples are of ``source`` from now on."""
        self.source = source
        self.slots = lru_cache(maxsize=4)(source.slots)  # each micro-batch asks for those of its step

    def sample(self, batch: Batch, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        """What the network is asked about ``batch``: noisy samples [B, C, H, W], their sigma [B], float32, and the target."""
        shape = tuple(batch.latents.shape[1:])
        # an objective that needs a sample's own noise mixes it with that; another one would teach it nothing. Images among
        # pairs have none, and are mixed with any
        own = batch.noise if "noise" in self.needs else None
        noise = draws.noise(shape) if own is None else own
        sigma = torch.from_numpy(draws.sigma(shape).astype(np.float32))
        return interpolate(batch.latents, noise, sigma), sigma, velocity(batch.latents, noise)

    def loss(self, model: Model, batch: NoisyBatch) -> Tensor:
        """The loss of each sample [B], float32, on the model's device; the same in training and validation."""
        noisy, sigma, target = (t.to(model.device, non_blocking=True) for t in (batch.noisy, batch.sigma, batch.target))
        v = model.velocity(noisy, sigma, batch.conditioning(model))
        loss = flow_loss(v, target, self.huber)
        if self.lpips is not None:
            loss = loss + self._unlike(model, denoised(noisy, sigma, v), denoised(noisy, sigma, target))
        return loss

    def _unlike(self, model: Model, made: Tensor, real: Tensor) -> Tensor:
        """LPIPS [B] of the images that one step from each sample reaches, from those of the pairs."""
        images = [model.family.decode(model.components, latents) for latents in (made, real)]
        ours, theirs = (x.expand(-1, 3, -1, -1) for x in images)
        found: Tensor = needed(self.lpips).to(model.device)(ours, theirs)
        return found

    def share(self, step: int, size: int, world: World) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Positions of a step in micro-batches, at most ``size`` of one shape: (those that are this process's, those that
        only pad its count to the others').

        Over all processes the first are all, and none twice. The second are empty unless all must run equally many
        passes; then they are the least work of the step, as often as it takes.
        """
        slots = self.slots(self.seed, step, self.batch)
        parts = _cut(slots, size)
        if world.size == 1:
            return parts, []
        work = [sum(slots[p].cost for p in part) for part in parts]
        dealt = partition_by_cost(work, world.size)
        own = [parts[i] for i in dealt[world.rank]]
        missing = max(map(len, dealt)) - len(own) if world.requires_equal_forwards else 0
        return own, [parts[work.index(min(work))]] * missing

    def sigmas(self, p: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """sigma [B], float64, of p [B] in (0, 1) for samples of ``shape``: the recipe's density, then its shift."""
        sigma = DENSITIES[self.sampling["density"]](p, **self.sampling["params"])
        return shift_sigma(sigma, self.shift_of(shape))

    def noisy_batch(self, step: int, positions: np.ndarray) -> NoisyBatch:
        """What is trained on at ``positions`` of ``step``. Raises UserError for a source without what it needs."""
        # drawn for the whole step and then indexed: what a sample gets does not depend on how the step is cut into
        # micro-batches or over processes
        p = probabilities(self.seed, "sigma", step, self.batch, self.sampling["stratify"])
        draws = Draws(
            p=p[positions],
            sigma=lambda shape: self.sigmas(p, shape)[positions],
            noise=lambda shape: keyed.noise(self.seed, "noise", step, positions, shape),
            more=lambda: keyed.uniforms(self.seed, "more", step, self.batch)[positions],
        )
        dropped = keyed.uniforms(self.seed, "caption-dropout", step, self.batch)[positions] < self.dropout
        told = keyed.uniforms(self.seed, "image-dropout", step, self.batch)[positions] >= self.image_dropout
        slots = self.slots(self.seed, step, self.batch)
        return self.asked([slots[p] for p in positions], draws, dropped, told & ~dropped)

    def validation_batches(self, count: int, size: int, world: World | None = None) -> list[NoisyBatch]:
        """``count`` held-out samples, at most ``size`` in each batch, in all the same whatever the size.

        Their sigmas stand in the middle of equal intervals, whatever the training density. Of several processes each
        gets its share of the batches.
        """
        world = world or World()
        slots = self.slots(self.seed, 0, count, held_out=True)
        parts = _cut(slots, size)
        work = [sum(slots[p].cost for p in part) for part in parts]
        return [self._validation_batch(slots, parts[i]) for i in partition_by_cost(work, world.size)[world.rank]]

    def _validation_batch(self, slots: list[Slot], positions: np.ndarray) -> NoisyBatch:
        count = len(slots)
        p = midpoints(self.seed, count)[positions]
        draws = Draws(
            p=p,
            # not by the training density: losses of two recipes are compared at the same sigmas
            sigma=lambda shape: p,
            noise=lambda shape: keyed.noise(self.seed, "validation/noise", 0, positions, shape),
            more=lambda: keyed.uniforms(self.seed, "validation/more", 0, count)[positions],
        )
        whole = np.full(len(positions), self.image_dropout < 1)
        return self.asked([slots[p] for p in positions], draws, dropped=np.zeros(len(positions), bool), told=whole)

    def asked(self, slots: list[Slot], draws: Draws, dropped: np.ndarray, told: np.ndarray) -> NoisyBatch:
        """dropped, told: [B], whose captions are not told, and whose own images are, where the source has them."""
        batch, part, names = self.source.draw(slots), slots[0].part, [slot.name for slot in slots]
        if not part and (missing := [field for field in self.needs if getattr(batch, field) is None]):
            lacks = f"the {' and '.join(missing)} of every sample"
            raise UserError(f"train.objective: '{self.name}' needs {lacks}, which '{self.source.name}' does not have")
        if part and batch.noise is not None:  # a pair was made with its caption, and is wrong without
            dropped = np.zeros_like(dropped)
        captions = ["" if drop else caption for caption, drop in zip(batch.captions, dropped)]
        text = None
        if batch.text is not None:
            text = replace(batch.text(captions), framing=batch.framing)
            if batch.features is not None and told.any():
                text = told_own(text, batch.features, torch.from_numpy(told))
        return NoisyBatch(*self.sample(batch, draws), captions, names, batch.image_ids or names, text, part=part)


def objective_for(
    recipe: Recipe, source: Source, shift_of: Callable[[tuple[int, ...]], float], schedule: Schedule | None = None
) -> Objective:
    """The objective that ``recipe`` names; the arguments are those of :class:`Objective`."""
    name = recipe.train.objective
    if name not in Objective.known:
        import_module(f"dedistill.objectives.{name}")
    return Objective.known[name](recipe, source, shift_of, schedule)


def _cut(slots: list[Slot], size: int) -> list[np.ndarray]:
    """Positions of slots of one shape and part, in the order of their first, at most ``size`` together."""
    groups: dict[object, list[int]] = {}
    for position, slot in enumerate(slots):
        groups.setdefault((slot.part, slot.shape), []).append(position)
    return [np.array(group[i : i + size]) for group in groups.values() for i in range(0, len(group), size)]
