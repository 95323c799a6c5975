"""The training loop: slots of the global batch, one update per step, whatever model, adapter or objective.

``Trainer.fit`` goes from step to step, ``train_step`` is one of them; both read from top to bottom.
"""

import sys
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from dedistill.data.source import QuarantineSource, Source
from dedistill.distributed.outside import BY_SIGNAL, StopRequests, heartbeat
from dedistill.distributed.world import ceil_div
from dedistill.errors import amount, enough_memory
from dedistill.evaluation.validation import Meters, Validator
from dedistill.models.model import Model
from dedistill.objectives.base import NoisyBatch, objective_for
from dedistill.recipe import Recipe
from dedistill.recipe.resolve import Plan, filled
from dedistill.runs.directory import RunDirectory
from dedistill.runs.metrics import MetricsLogger, Row, Trackers
from dedistill.runs.pace import Pace
from dedistill.sampling.sampler import Sampling
from dedistill.training.engine import Engine, learning_rate
from dedistill.training.guards import EVERY, BadSteps, Guard, ParameterChangeCheck, Rollback
from dedistill.training.keeping import Keeper, RunState
from dedistill.training.online import OnlinePairs
from dedistill.training.preview import Preview

MicroBatches = Generator[tuple[np.ndarray, NoisyBatch] | None, None, None]
"""Positions and samples of one micro-batch after the other; None where a step ends. No positions: it counts for nothing."""


class Trainer:
    """Everything a run consists of. ``fit`` reads as the run goes."""

    def __init__(
        self,
        recipe: Recipe,
        plan: Plan,
        *,
        model: Model,
        source: Source,
        run: RunDirectory,
        engine: Engine,
        online: OnlinePairs | None = None,
    ):
        """Every process of ``engine.world`` has a trainer and trains; rank 0 alone writes into ``run``.

        ``engine`` holds ``model`` already. online: of ``source``, what the model makes itself.
        """
        self.online = online
        self.recipe, self.plan, self.model, self.run = recipe, plan, model, run
        self.source, self.engine, self.world = source, engine, engine.world
        self.state = RunState(Guard(recipe.train.spike))
        self.keeper = Keeper(recipe, run, engine, self.state)
        self.objective = objective_for(recipe, source, model.shift, model.components.schedule)
        self.change_check = ParameterChangeCheck(engine.bit_sums, model.modules())
        self.trained_now = False
        self.stopping = ""
        """How some process was asked to stop, as StopRequests.poll says it."""
        self.requests = {"save": False, "sample": False}
        self.pace = Pace(plan.batch, model.device)
        self.passes: list[tuple[tuple[int, ...], int | None]] = []
        """Of the last step: shape of the samples [B, C, H, W], and tokens of their captions where they are encoded already."""
        self.data_wait_s = 0.0
        """Seconds since the last line of timings.jsonl in which training stood still for data."""
        self.micro_batch = min(plan.micro_batch, ceil_div(plan.batch, self.world.size))
        validate, meters, preview = recipe.validate_, recipe.meters, recipe.preview
        at_once, world = self._at_once, self.world
        self.validate = None
        if validate.every:
            samples = filled(validate.samples, "validate.samples")
            self.validate = Validator(self.objective, samples, at_once(samples), world)
        self.meters = None
        if meters.every:
            how = Sampling(solver=recipe.sample.solver, steps=meters.steps)
            self.meters = Meters(self.objective, meters.samples, how, at_once(meters.samples), world)
        here = preview.every and (world.main or world.requires_equal_forwards)
        self.preview = Preview(recipe, model, run.previews, world) if here else None

    def _at_once(self, samples: int) -> int:
        """How many of ``samples`` held-out ones go through in one pass."""
        return 1 if self.recipe.train.exact else min(self.model.chunk, ceil_div(samples, self.world.size))

    def facts(self) -> dict[str, object]:
        """What the run's settings came to, for plan.json."""
        optimizer = type(self.engine.optimizer)
        return {
            "objective": self.objective.name,
            "sigma": self.objective.sampling | {"shift": self.objective.shift_of(self.model.components.sample_shape)},
            "caption_dropout": self.objective.dropout,
            "optimizer": optimizer.__module__.split(".")[0] + "." + optimizer.__name__,
            "betas": list(self.recipe.train.betas),
            "parameter_dtype": str(next(iter(self.engine.trainable.values())).dtype),
            "bf16": self.model.bf16,
            "samples_held_out": self.validate.samples if self.validate else 0,
            "engine": self.engine.name,
            "processes": self.world.size,
            "samples_at_once": self.micro_batch,
        }

    def resume(self) -> list[str]:
        """Continue from the newest good checkpoint, if there is one; returns what a user should know of damaged ones."""
        notes = self.keeper.resume()
        self._settle()
        return notes

    def _settle(self) -> None:
        """Take in a state that was loaded: weights to compare later ones with, and samples that are left out."""
        self.change_check.start()
        if self.online:
            self.online.rollback(self.state.step)
        quarantined_from = self.state.guard.quarantined_from()
        self.objective.take(QuarantineSource(self.source, quarantined_from) if quarantined_from else self.source)

    # --- from step to step -------------------------------------------------------------------------------------------

    def fit(self, stop: StopRequests, trackers: Trackers | None) -> Iterator[Row]:
        """Train to the last step, yielding one row per step; returns early, saved, when a stop is asked for.

        Every process yields the same rows.
        """
        state = self.state
        before: Row = {}
        if state.step == 0:
            found = [measure(self.model) for measure in (self.validate, self.meters) if measure]
            before = {f"{key}_start": value for numbers in found if numbers for key, value in numbers.items()}
            if self.preview:
                self.preview(0)
        record = MetricsLogger(self.run, state.step - bool(state.unfinished)) if self.world.main else None
        if record and (gone := state.rows - record.metrics.rows) > 0:
            rows = amount(gone, "row is", "rows are")
            print(f"'{self.run.metrics}': {rows} missing or damaged of {state.rows:,}; training goes on", file=sys.stderr)
        self.model.root.train()
        self.pace.start()
        self.stop, micro_batches = stop, ahead(self.micro_batches(state.step))
        try:
            if state.unfinished:
                self.trained_now = True
                yield self._conclude(state.unfinished, record, trackers)
            while state.step < self.plan.steps and not self.stopping:
                self.keeper.writer.check()
                if self.online and self.online.due(state.step):
                    micro_batches.close()  # of the old pairs
                    self.online.make(state.step)
                    self.objective.take(self.objective.source)
                    micro_batches = ahead(self.micro_batches(state.step))
                start = time.monotonic()
                try:
                    row = self.train_step(state.step, micro_batches)
                except Rollback as back:
                    micro_batches.close()
                    self._roll_back(back.step)
                    record = record and record.reopened(self.run, state.step)
                    micro_batches = ahead(self.micro_batches(state.step))
                    continue
                except BadSteps:
                    if self.trained_now:  # the weights are good: bad steps were not applied
                        self.keeper.checkpoint(wait=True)
                    raise
                self.pace.took(time.monotonic() - start, self.passes)
                if state.step == 0:
                    row |= before
                state.step, self.trained_now = state.step + 1, True
                stop.deferred = True  # from now on there is something to save
                yield self._conclude(row, record, trackers)
        finally:
            stop.deferred = False
            micro_batches.close()
            self.keeper.writer.close()
            if record:
                record.close()

    def check_applied(self) -> None:
        """Raises BadSteps when the run has come to its end and none of its steps changed anything."""
        if self.state.step == self.plan.steps == self.state.skipped:
            raise BadSteps(
                f"none of the {amount(self.plan.steps, 'step')} was applied: each had a loss or gradient that was not finite "
                f"or far too large. The weights are those of the start. '{self.run.metrics}' says which samples stood out; "
                "lower train.lr, or look at what the recipe trains on"
            )

    def micro_batches(self, start: int) -> MicroBatches:
        """Every micro-batch of this process, from step ``start`` on."""
        step, positions = start, np.arange(0)
        with enough_memory(lambda: f"loading positions {positions.tolist()} of step {step + 1}"):
            for step in range(start, self.plan.steps):
                own, padding = self.objective.share(step, self.micro_batch, self.world)
                # padding first, while there are no gradients yet that theirs could get into
                for positions, counted in [*((c, c[:0]) for c in padding), *((o, o) for o in own)]:
                    noisy = self.objective.noisy_batch(step, positions)
                    yield counted, noisy.pinned() if self.model.device.type == "cuda" else noisy
                yield None

    def train_step(self, step: int, micro_batches: MicroBatches) -> Row:
        """One optimizer step over all slots of the global batch; every sample weighs the same. Returns its row."""
        losses, sigmas, parts, grad_norm = self._gradients(micro_batches)
        lr = learning_rate(self.recipe, step)
        # all of this is the same on every process, so all decide alike
        wrong = self.state.guard.judge(step, losses, sigmas, grad_norm, partial(self._names, step))
        if wrong:
            self.engine.discard()
            self.state.skipped += 1
        else:
            self.engine.apply(lr)
            self.change_check.applied += 1
            self.keeper.averages.update(step + 1)
        mean = float(losses.mean())
        row: Row = {"step": step + 1, "loss": mean, "lr": lr, "grad_norm": grad_norm, "applied": not wrong}
        if left_out := [{"sample": n, **e} for n, e in self.state.guard.quarantine.items() if e["since"] == step]:
            row["quarantined"] = left_out
        if wrong:
            return {**row, "loss": str(mean), "grad_norm": str(grad_norm), **wrong}  # JSON has no NaN
        row |= {"sigma_mean": float(sigmas.mean()), "sigma_loss": sigma_bins(losses, sigmas, self.recipe.log.sigma_bins)}
        return row | {f"loss_{part}": float(losses[[p == part for p in parts]].mean()) for part in sorted({*parts} - {""})}

    def _names(self, step: int, positions: list[int]) -> list[str]:
        slots = self.objective.slots(self.recipe.run.seed, step, self.plan.batch)
        return [slots[p].name for p in positions]

    def _gradients(self, micro_batches: MicroBatches) -> tuple[Tensor, Tensor, tuple[str, ...], float]:
        """Leave the gradient of the whole batch in place; (losses [B], sigmas [B], parts of a mixture [B], its norm).

        What comes back is of all processes, in the order of positions, so that it does not depend on who did what.
        """
        positions: list[int] = []
        losses: list[Tensor] = []
        sigmas: list[float] = []
        parts: list[str] = []
        self.passes = []
        heartbeat.step = self.state.step
        while True:
            start = time.monotonic()
            heartbeat.beat("waiting for data")
            item = next(micro_batches)
            heartbeat.beat("training")
            self.data_wait_s += time.monotonic() - start
            if item is None:
                break
            counted, noisy = item
            self.passes.append((noisy.noisy.shape, noisy.text.sequences[0].mask.shape[1] if noisy.text is not None else None))
            loss = self.objective.loss(self.model, noisy)  # one number per sample
            self.engine.backward(loss.sum() / self.plan.batch, counts=len(counted) > 0)
            positions += counted.tolist()
            losses.append(loss.detach()[: len(counted)])
            sigmas += noisy.sigma[: len(counted)].tolist()
            parts += [noisy.part] * len(counted)
        # words before gradients: they may be waited for longer, and not on the GPU (see World)
        asked = self.world.gather(self.stop.poll())
        self.stopping = max(request["stop"] for request in asked)
        self.requests = {key: any(request[key] for request in asked) for key in ("save", "sample")}
        norm = self.engine.finish()
        # the only time that a GPU is waited for
        *numbers, grad_norm = torch.cat([*losses, norm[None]]).tolist()
        own = list(zip(positions, numbers, sigmas, parts, strict=True))
        _, every_loss, every_sigma, every_part = zip(*sorted(slot for slots in self.world.gather(own) for slot in slots))
        return torch.tensor(every_loss), torch.tensor(every_sigma), every_part, grad_norm

    # --- between two steps -------------------------------------------------------------------------------------------

    def _conclude(self, row: Row, record: MetricsLogger | None, trackers: Trackers | None) -> Row:
        """What belongs to the end of a step: validation, files, logs. Returns the whole row."""
        recipe, state = self.recipe, self.state
        state.unfinished = None
        last = state.step == self.plan.steps
        validate = self.validate if _due(recipe.validate_.every, state.step, last) else None
        saving = last or self.requests["save"] or _due(recipe.checkpoint.every, state.step, last)
        # where the learning rate goes to its end, steps may be below what weights can hold
        fading = recipe.train.schedule != "constant" and state.step > 0.95 * self.plan.steps
        if (validate or saving or state.step % EVERY == 0) and not fading:
            self.change_check.check(state.step)
        if validate:
            found = validate(self.model, self._interrupted)
            if found is None:  # the next start validates, and writes the row
                self.stopping, state.unfinished = BY_SIGNAL, row
            else:
                row |= found
        if self.meters and not state.unfinished and _due(recipe.meters.every, state.step, last):
            row |= self.meters(self.model)
        heartbeat.beat("writing and saving", patient=True)
        if not state.unfinished:
            if _due(recipe.snapshot.every, state.step, last):
                self.keeper.snapshot()
            if self.requests["sample"] or _due(recipe.preview.every, state.step, last):
                self._preview()
            special = {"val_loss", "guidance_gap", "quarantined"} & row.keys() or last or not row["applied"]
            if special or row["step"] == 1 or _due(recipe.log.every, state.step, last):
                state.rows += 1
                if record:
                    record.write(row, {"data_wait_s": round(self.data_wait_s, 4), **self.pace.facts()})
                    self.data_wait_s = 0.0
                    if trackers:
                        trackers.log(row, state.step)
        if saving or self.stopping:
            if record:
                record.sync()
            self.keeper.checkpoint(wait=last or bool(self.stopping))
        return row

    def _preview(self) -> None:
        if self.preview:
            self.preview(self.state.step, self._interrupted)
        elif self.world.main and self.requests["sample"]:
            print("asked for previews, but the recipe has no [preview] table", file=sys.stderr)

    def _interrupted(self) -> bool:
        """Whether this process may leave a validation or previews unfinished."""
        return self.stop.interrupted() and not self.world.requires_equal_forwards

    def _roll_back(self, since: int) -> None:
        """Train again from step ``since`` or before, without the samples that are quarantined from there on."""
        self.keeper.roll_back(since)
        self._settle()
        if self.world.main:
            left_out = [name for name, entry in self.state.guard.quarantine.items() if entry["since"] == since]
            samples = amount(len(left_out), "sample stands out and is", "samples stand out and are")
            message = f"step {since + 1} and those after it: {samples} left out from there on"
            print(f"{message}, e.g. {left_out[0]}; trained again from step {self.state.step + 1} on", file=sys.stderr)


def sigma_bins(losses: Tensor, sigmas: Tensor, bins: int) -> list[float | None]:
    """Mean loss in ``bins`` equal bins of sigma; None where no sample fell."""
    place = (sigmas * bins).long().clamp(0, bins - 1)
    return [float(losses[place == b].mean()) if (place == b).any() else None for b in range(bins)]


def _due(every: int, step: int, last: bool) -> bool:
    return bool(every) and (last or step % every == 0)


# --- work done ahead of its use, while the caller is busy with the items before --------------------------------------


Item = TypeVar("Item")
TOGETHER = 4
"""Items made at a time: on busy cores it is waking the thread that costs, not the making."""


def ahead(items: Iterator[Item]) -> Generator[Item, None, None]:
    """``items``, ``TOGETHER`` of them made by a thread while those before are in use. Errors come in their item's place."""
    with ThreadPoolExecutor(1, thread_name_prefix="data") as pool:
        coming, error = pool.submit(_make, items), None
        while error is None:
            made, error = coming.result()
            if not made and error is None:
                return
            coming = pool.submit(_make, items)
            yield from made
        raise error


def _make(items: Iterator[Item]) -> tuple[list[Item], Exception | None]:
    made: list[Item] = []
    try:
        made.extend(islice(items, TOGETHER))  # keeps what came before an error
    except Exception as e:
        return made, e
    return made, None
