"""What a model says of held-out samples, on fixed noise and sigmas: its loss, and how distilled it still is."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from dedistill.data.split import LEAST_UNITS
from dedistill.distributed.outside import heartbeat
from dedistill.distributed.world import World
from dedistill.evaluation.meters import RatioEstimate, path_numbers
from dedistill.flow.guidance import CONDITIONAL
from dedistill.flow.path import flow_loss, implied_noise
from dedistill.flow.solvers import sigma_grid
from dedistill.models.model import Model
from dedistill.objectives.base import NoisyBatch, Objective
from dedistill.sampling.sampler import Sampling, path

# --- what a model predicts on held-out samples -----------------------------------------------------------------------


@torch.no_grad()
def held_out_meters(model: Model, batches: list[NoisyBatch], bins: int) -> dict[str, RatioEstimate]:
    """Meters of fixed validation batches, over all and (``_by_sigma``) in ``bins`` equal bins of sigma.

    loss: flow-matching loss of the captioned samples. guidance: |velocity with caption - without|^2 per element, by
    which one unit of CFG moves a velocity. A distilled guidance embedding is fed what it is fed in training.
    """
    with model.evaluating():
        numbers = np.concatenate([held_out_numbers(model, batch) for batch in batches])
    order = numbers[:, 0].argsort()  # every model's samples in one order, however they were batched
    images = [image for batch in batches for image in batch.image_ids]
    images = [images[i] for i in order]
    sigma, *columns = numbers[order].T
    member = np.eye(bins)[np.minimum((sigma * bins).astype(int), bins - 1)]
    found = {}
    for key, column in zip(("loss", "guidance"), columns):
        found[key] = RatioEstimate.of(column[:, None], np.ones((len(column), 1)), images, sigma)
        found[f"{key}_by_sigma"] = RatioEstimate.of(column[:, None] * member, member, images)
    return found


def held_out_numbers(model: Model, batch: NoisyBatch) -> np.ndarray:
    """sigma, loss and squared difference between the two branches of each sample [B, 3]."""
    text = batch.conditioning(model)
    noisy, sigma = batch.noisy.to(model.device), batch.sigma.to(model.device)
    own = model.velocity(noisy, sigma, text)
    other = model.velocity(noisy, sigma, replace(model.encode([model.negative]).expand(len(text)), framing=text.framing))
    columns = (sigma, flow_loss(own, batch.target.to(model.device)), flow_loss(own, other))
    return torch.stack(columns, 1).double().cpu().numpy()


# --- loss on held-out samples, on fixed noise and fixed sigmas -------------------------------------------------------


class Validator:
    """Held-out loss with its standard error. Draws nothing from the training's keys."""

    def __init__(self, objective: Objective, samples: int, size: int, world: World | None = None):
        """samples: held-out samples asked each time, at most ``size`` of them at once, shared by the processes of ``world``."""
        self.objective, self.samples, self.world = objective, samples, world or World()
        self.batches, self.padding = fixed_share(objective, samples, size, self.world)

    @torch.no_grad()
    def __call__(self, model: Model, interrupted: Callable[[], bool] = lambda: False) -> dict[str, float] | None:
        """{"val_loss", "val_images", "val_loss_se"} in evaluation mode, the same on every process; images: different ones
        that the samples are of. No standard error where these are fewer than 16. Of a mixture also those of each part, as
        "val_loss_pairs" and so on.

        None as soon as any process was ``interrupted``: a validation may take longer than a stop may.
        """
        own: list[tuple[float, float, str, str]] = []
        with model.evaluating():
            for batch in self.padding:
                self.objective.loss(model, batch)
            for batch in self.batches:
                if interrupted():
                    break
                heartbeat.beat(f"validating {len(own)}/{sum(len(batch.noisy) for batch in self.batches)}")
                losses = self.objective.loss(model, batch).tolist()
                own += zip(batch.sigma.tolist(), losses, batch.image_ids, [batch.part] * len(losses))
        heard = self.world.gather((own, interrupted()))
        if any(ended for _, ended in heard):
            return None
        rows = sorted((s, loss, image, part) for rows, _ in heard for s, loss, image, part in rows)
        found = _loss_of(rows, "")
        for part in sorted({part for *_, part in rows} - {""}):
            found |= _loss_of([row for row in rows if row[-1] == part], f"_{part}")
        return found


def _loss_of(rows: Sequence[tuple[float, float, str, str]], of: str) -> dict[str, float]:
    """Of sigma, loss, image and part of each sample."""
    sigmas, losses, images, _ = zip(*rows)
    error = standard_error(sigmas, losses, images)
    found = {f"val_loss{of}": float(np.mean(losses)), f"val_images{of}": len(set(images))}
    return found if error is None else found | {f"val_loss{of}_se": error}


def fixed_share(objective: Objective, samples: int, size: int, world: World) -> tuple[list[NoisyBatch], list[NoisyBatch]]:
    """Validation batches of this process, and what it runs for nothing where all must run equally many passes."""
    batches = objective.validation_batches(samples, size, world)
    most = max(world.gather(len(batches))) if world.requires_equal_forwards else 0
    return batches, objective.validation_batches(1, 1) * (most - len(batches))


def standard_error(sigmas: Sequence[float], losses: Sequence[float], images: Sequence[str]) -> float | None:
    """Of the mean loss over images like these. What differs between sigmas, which are fixed, does not count as uncertainty,
    and the draws of one image count as one (Cochran 1977, ch. 9). None for fewer than 16 images."""
    one = np.ones((len(losses), 1))
    reading = RatioEstimate.of(np.array(losses)[:, None], one, images, np.array(sigmas))
    if (count := len(reading.top)) < LEAST_UNITS:
        return None
    rest = reading.top - reading.value * reading.bottom
    return math.sqrt(count / (count - 1) * float((rest**2).sum())) / len(losses)


# --- how distilled the model still is while it trains ----------------------------------------------------------------


FEW = 4


class Meters:
    """Guidance gap, straightness and few-step gap of fixed held-out captions and noise, at CFG 1.

    Draws nothing from the training's keys. See ``dedistill.evaluation.meters`` for what the numbers are.
    """

    def __init__(self, objective: Objective, samples: int, how: Sampling, size: int, world: World | None = None):
        """samples: held-out samples, at most ``size`` at once, shared by the processes of ``world``; how: paths are made."""
        self.how, self.world = how, world or World()
        self.batches, self.padding = fixed_share(objective, samples, size, self.world)

    @torch.no_grad()
    def __call__(self, model: Model) -> dict[str, float]:
        """{"guidance_gap", "straightness", "few_step_gap"} in evaluation mode, the same on every process."""
        with model.evaluating():
            for batch in self.padding:
                self._ask(model, batch)
            own = [row for batch in self.batches for row in self._ask(model, batch)]
        rows = sorted(row for rows in self.world.gather(own) for row in rows)  # by sigma, of which each sample has its own
        _, gap, curvature, few, chord = np.array(rows).sum(0).tolist()
        return {"guidance_gap": gap / len(rows), "straightness": curvature / chord, "few_step_gap": few / chord}

    def _ask(self, model: Model, batch: NoisyBatch) -> list[list[float]]:
        """sigma, guidance gap, curvature, few-step gap and chord of each sample."""
        sigma, _, gap = held_out_numbers(model, batch).T
        noise = implied_noise(batch.noisy, batch.sigma, batch.target)
        sigmas = sigma_grid(self.how.steps, model.grid_shift)
        chord, curvature, _, end = path_numbers(self._path(model, batch, noise, self.how.steps), sigmas)
        short = self._path(model, batch, noise, FEW)[-1].flatten(1).double().numpy()
        return np.stack([sigma, gap, curvature @ -np.diff(sigmas), np.square(short - end).mean(1), chord], 1).tolist()

    def _path(self, model: Model, batch: NoisyBatch, noise: Tensor, steps: int) -> list[Tensor]:
        states = []
        for state in path(model, {CONDITIONAL: batch.conditioning(model)}, noise, replace(self.how, steps=steps)):
            heartbeat.beat("measuring")
            states.append(state.float().cpu())
        return states
