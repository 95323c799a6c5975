"""The training loop: slots of the global batch, one update per step, whatever model, adapter or objective."""

import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

from dedistill.data.source import Source, Substitutes
from dedistill.distributed.heartbeat import pulse
from dedistill.distributed.world import World, even_share
from dedistill.errors import UserError, enough_memory
from dedistill.evaluation.validation import Meters, Validator, sigma_bins
from dedistill.io.safetensors import tensors_checksum
from dedistill.models.model import Model
from dedistill.objectives.base import NoisyBatch, objective_for
from dedistill.posthoc.snapshots import write_snapshot
from dedistill.recipe import Recipe
from dedistill.recipe.resolve import Plan
from dedistill.runs.checkpoint import drop_after, newest_until, newest_valid, read_checkpoint, save_checkpoint
from dedistill.runs.directory import RunDirectory
from dedistill.runs.metrics import Record, Trackers, last_step
from dedistill.runs.model import export_model, exported_step, snapshot_header
from dedistill.runs.requests import BY_SIGNAL, Requests
from dedistill.training.background import Saver, ahead
from dedistill.training.ema import Averages
from dedistill.training.guards import EVERY, BadSteps, GoBack, Guard, Ledger
from dedistill.training.optim import learning_rate, not_finite
from dedistill.training.preview import Preview
from dedistill.training.step import Update, WholeUpdate

Tasks = Iterator[tuple[np.ndarray, NoisyBatch] | None]
"""Positions and task of one micro-batch after the other; None where a step ends. No positions: the task counts for nothing."""


class Trainer:
    """Everything a run consists of. ``fit`` reads as the run goes."""

    def __init__(self, recipe: Recipe, plan: Plan, model: Model, source: Source, run: RunDirectory, world: World):
        """Every process of ``world`` has a trainer and trains; rank 0 alone writes into ``run``."""
        self.recipe, self.plan, self.model, self.run, self.world = recipe, plan, model, run, world
        self.guard, self.saver = Guard(recipe.train.spike), Saver()
        self.source = Substitutes(source, self.guard.since())
        self.objective = objective_for(recipe, self.source, model.shift)
        self.trainable = model.trainable()
        self.update = _update(recipe, plan, model, world)
        self.ledger = Ledger(self.update.bit_sums, model.modules())
        self.averages = Averages(recipe.snapshot.ema or [], self.trainable)
        self.step = 0
        self.skipped = 0
        self.trained_now = False
        self.stopping = ""
        """How some process was asked to stop, as Requests.asked says it."""
        self.asked = {"save": False, "sample": False}
        self.unfinished: dict | None = None
        """The row of the last step, where a stop came before its validation."""
        self.waited = 0.0
        """Seconds since the last line of timings.jsonl in which training stood still for data."""
        self.notes: list[str] = []
        every, samples = recipe.validate_.every, recipe.validate_.samples
        self.micro_batch = min(plan.micro_batch, even_share(plan.batch, world.size))
        self.validate = Validator(self.objective, samples, self._at_once(samples), world) if every else None
        m = recipe.meters
        self.meters = Meters(self.objective, m.samples, m.steps, self._at_once(m.samples), world) if m.every else None
        previews = recipe.preview.every and (world.main or world.lockstep)
        self.preview = Preview(recipe, model, run.previews, world) if previews else None

    def _at_once(self, samples: int) -> int:
        """How many of ``samples`` held-out ones go through in one pass."""
        return 1 if self.recipe.train.exact else min(self.model.chunk, even_share(samples, self.world.size))

    def facts(self) -> dict:
        """What the run's settings came to, for plan.json."""
        return {
            "objective": self.objective.name,
            "sigma": self.objective.sampling | {"shift": self.objective.shift_of(self.model.parts.picture)},
            "caption_dropout": self.objective.dropout,
            "optimizer": type(self.update.optimizer).__module__.split(".")[0] + "." + type(self.update.optimizer).__name__,
            "betas": list(self.recipe.train.betas),
            "parameter_dtype": str(next(iter(self.trainable.values())).dtype),
            "bf16": self.model.bf16,
            "samples_held_out": self.validate.samples if self.validate else 0,
            "engine": self.world.engine,
            "processes": self.world.size,
            "samples_at_once": self.micro_batch,
        }

    def resume(self) -> None:
        """Continue from the newest good checkpoint, if there is one. Every process ends up with the same state."""
        if self.world.main:
            found, self.notes = newest_valid(self.run.checkpoints)
            every, reached = self.recipe.checkpoint.every, last_step(self.run.metrics)
            if found is None and every and reached > 2 * every:  # the second save waits for the first
                raise UserError(
                    f"'{self.run.metrics}' goes up to step {reached}, but there is no checkpoint in '{self.run.checkpoints}'. "
                    "Restore one, or move the run directory away to start over."
                )
        name = self.world.from_main(found.name if self.world.main and found else None)
        if name is not None:
            self.read(self.run.checkpoints / name)
        self._compare("weights", self.update.replicas())

    def read(self, checkpoint: Path) -> None:
        groups, manifest = read_checkpoint(checkpoint)
        self._compare("optimizer state", groups.get("optimizer", {}))
        self.update.load(groups["trainable"], groups.get("optimizer", {}), str(checkpoint))
        self.averages.load(groups, str(checkpoint))
        self.step, self.skipped, self.unfinished = manifest["step"], manifest["skipped"], manifest["unfinished"]
        self.guard.load(manifest["guard"])
        self.ledger.start()
        self.source.since = self.guard.since()
        if self.step > self.plan.steps:
            raise UserError(f"'{checkpoint}' is at step {self.step}, train.steps is {self.plan.steps}: nothing is left to do")

    def fit(self, stop: Requests, trackers: Trackers) -> Iterator[dict]:
        """Train to the last step, yielding one row per step; returns early, saved, when a stop is asked for.

        Every process yields the same rows.
        """
        record = Record(self.run, self.step - bool(self.unfinished)) if self.world.main else None
        before = {}
        if self.step == 0 and self.validate:
            before = {f"{key}_start": value for key, value in self.validate(self.model).items()}
        if self.step == 0 and self.meters:
            before |= {f"{key}_start": value for key, value in self.meters(self.model).items()}
        if self.step == 0 and self.preview:
            self.preview(0)
        if record:
            record.clock.lap()
        self.model.root.train()
        self.stop, tasks = stop, ahead(self._tasks(self.step))
        try:
            if self.unfinished:
                self.trained_now = True
                yield self._concluded(self.unfinished, record, trackers)
            while self.step < self.plan.steps and not self.stopping:
                self.saver.check()
                try:
                    row = self._guarded_step(self.step, tasks) | (before if self.step == 0 else {})
                except GoBack as back:
                    tasks.close()
                    self._rollback(back.since)
                    record = record and record.reopened(self.run, self.step)
                    tasks = ahead(self._tasks(self.step))
                    continue
                self.step, self.trained_now = self.step + 1, True
                stop.deferred = True
                yield self._concluded(row, record, trackers)
        finally:
            stop.deferred = False
            tasks.close()
            self.saver.close()
            if record:
                record.close()

    def _rollback(self, since: int) -> None:
        """Back to the newest good checkpoint of at most ``since`` steps, without those after it, with today's quarantine.

        Without such a one: to ``since`` itself, which is saved; its weights are the present ones, since nothing was applied
        after it. Either way the same steps come of it: no sample is left out before ``since``.
        """
        folder, judged = self.run.checkpoints, self.guard.state()
        self.saver.wait()
        found = newest_until(folder, since) if self.world.main else None
        name = self.world.from_main(found.name if found else None)
        if self.world.main:
            drop_after(folder, since, keep=0 if name else 1)  # at any instant there is one to go on from
        self.update.drop()
        self.step, self.skipped = since, self.skipped - (self.step - since)
        if name is not None:
            self.read(folder / name)
        self.guard.load({key: judged[key] for key in ("quarantine", "returned")})
        self.source.since = self.guard.since()
        self.unfinished = None  # its row was written since
        if name is None:
            self.checkpoint(wait=True)
        if self.world.main:
            drop_after(folder, since)
            left_out = [name for name, entry in self.guard.quarantine.items() if entry["since"] == since]
            said = f"step {since + 1} and those after it: {len(left_out)} samples stand out and are left out from there on"
            print(f"{said}, e.g. {left_out[0]}; trained again from step {self.step + 1} on", file=sys.stderr)

    def _concluded(self, row: dict, record: Record | None, trackers: Trackers) -> dict:
        """What belongs to the end of a step: validation, files, logs. Returns the whole row."""
        last = self.step == self.plan.steps
        validating = self.validate and (last or self.step % self.recipe.validate_.every == 0)
        saving = last or self.asked["save"] or _due(self.recipe.checkpoint.every, self.step, last)
        if (validating or saving or self.step % EVERY == 0) and not self._fading():
            self.ledger.check(self.step)
        if validating:
            found = self.validate(self.model, self._interrupted)
            if found is None:  # the next start validates, and writes the row
                self.stopping, self.unfinished = BY_SIGNAL, row
            else:
                row, self.unfinished = row | found, None
        if self.meters and not self.unfinished and _due(self.recipe.meters.every, self.step, last):
            row |= self.meters(self.model)
        pulse.beat("writing and saving", patient=True)
        if not self.unfinished:
            self._write(row, last, record, trackers)
        if saving or self.stopping:
            if record:
                record.sync()
            self.checkpoint(wait=last or bool(self.stopping))
        return row

    def _write(self, row: dict, last: bool, record: Record | None, trackers: Trackers) -> None:
        if _due(self.recipe.snapshot.every, self.step, last):
            self._snapshot()
        if self.preview and (_due(self.recipe.preview.every, self.step, last) or self.asked["sample"]):
            self.preview(self.step, self._interrupted)
        elif self.world.main and self.asked["sample"]:
            print("asked for previews, but the recipe has no [preview] table", file=sys.stderr)
        special = row["step"] == 1 or last or not row["applied"]
        special |= not row.keys().isdisjoint(("val_loss", "guidance_gap", "quarantined"))
        if record and (special or self._logged()):
            record.write(row, self.waited)
            self.waited = 0.0
            trackers.log(row, self.step)

    def _interrupted(self) -> bool:
        """Whether this process may leave a validation or previews unfinished."""
        return self.stop.interrupted() and not self.world.lockstep

    def _fading(self) -> bool:
        """Whether the learning rate goes to its end, where steps may be below what weights can hold."""
        return self.recipe.train.schedule != "constant" and self.step > 0.95 * self.plan.steps

    def _logged(self) -> bool:
        return self.step % self.recipe.log.every == 0

    def _tasks(self, start: int) -> Tasks:
        """Every micro-batch of this process, from step ``start`` on."""
        for step in range(start, self.plan.steps):
            own, company = self.objective.share(step, self.micro_batch, self.world)
            # company first, while there are no gradients yet that theirs could get into
            for positions, counted in [*((c, c[:0]) for c in company), *((o, o) for o in own)]:
                with enough_memory(f"loading positions {positions.tolist()} of step {step + 1}"):
                    task = self.objective.noisy_batch(step, positions)
                yield counted, task
            yield None

    def _guarded_step(self, step: int, tasks: Tasks) -> dict:
        try:
            return self._train_step(step, tasks)
        except BadSteps:
            if self.trained_now:  # the weights are good: bad steps were not applied
                self.checkpoint(wait=True)
            raise

    def _train_step(self, step: int, tasks: Tasks) -> dict:
        """One optimizer step over all slots of the global batch; every sample weighs the same."""
        loss, sigma = self._gradients(tasks)
        grad_norm = self.update.norm()
        lr = learning_rate(self.recipe, step)
        mean = float(loss.mean())
        names = partial(self.source.names, self.recipe.run.seed, step, batch=self.plan.batch)
        wrong = self.guard.judge(step, loss, sigma, grad_norm, names)
        if not wrong:
            self._check_optimizer(step)
            self.update.apply(lr)
            self.ledger.applied += 1
            self.averages.update(step + 1)
        else:
            self.update.drop()
            self.skipped += 1
        row = {"step": step + 1, "loss": mean, "lr": lr, "grad_norm": grad_norm, "applied": not wrong}
        if left_out := [{"sample": n, **entry} for n, entry in self.guard.quarantine.items() if entry["since"] == step]:
            row["quarantined"] = left_out
        if wrong:
            return {**row, "loss": str(mean), "grad_norm": str(grad_norm), **wrong}
        return row | {"sigma_mean": float(sigma.mean()), "sigma_loss": sigma_bins(loss, sigma, self.recipe.log.sigma_bins)}

    def _gradients(self, tasks: Tasks) -> tuple[torch.Tensor, torch.Tensor]:
        """Leave the gradient of the whole batch in place; (losses [B], sigmas [B]).

        What comes back is of all processes, in the order of positions, so that it does not depend on who did what.
        """
        slots = []
        while (item := self._next(tasks)) is not None:
            positions, task = item
            loss = self.objective.loss(self.model, task)  # one number per sample
            self.update.backward(loss.sum() / self.plan.batch, counts=len(positions) > 0)
            slots += zip(positions.tolist(), loss.tolist(), task.sigma.tolist())
        heard = self.world.gather({"slots": slots, **self.stop.asked()})
        self.stopping = max(h["stop"] for h in heard)
        self.asked = {what: any(h[what] for h in heard) for what in self.asked}
        self.update.finish()
        _, losses, sigmas = zip(*sorted(slot for h in heard for slot in h["slots"]))
        return torch.tensor(losses), torch.tensor(sigmas)

    def _next(self, tasks: Tasks) -> tuple[np.ndarray, NoisyBatch] | None:
        start = time.monotonic()
        pulse.step = self.step
        pulse.beat("waiting for data")
        item = next(tasks)
        pulse.beat("training")
        self.waited += time.monotonic() - start
        return item

    def _check_optimizer(self, step: int) -> None:
        """Raises UserError for a state that would spoil every weight it touches, however good the gradient."""
        if bad := self.update.spoilt():
            raise UserError(
                f"before step {step + 1} the optimizer state holds {len(bad)} tensors that are not finite, e.g. {bad[0]}. "
                "The step was not applied; start again to go on from the last checkpoint."
            )

    def _good(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """``tensors`` to be saved. Raises UserError, on every process, for those that a finite step has blown up."""
        if bad := self.world.from_main(not_finite(tensors)):
            raise UserError(
                f"after step {self.step} {len(bad)} tensors are not finite, e.g. {bad[0]}; not saved. "
                "Lower train.lr or train.weight_decay; what was saved before is intact."
            )
        return tensors

    def _snapshot(self) -> None:
        weights = self._good(self.update.weights())
        if self.world.main:
            header = snapshot_header(self.recipe, self.step)
            write_snapshot(self.run.snapshots, self.step, weights, header)
            self.averages.write(self.run.snapshots, self.step, weights, header)

    def checkpoint(self, *, wait: bool) -> None:
        """Rank 0 saves beside training, after all have agreed on what. wait: until it is safe; nobody ends before that."""
        self._compare("weights", self.update.replicas())
        groups = {"trainable": self.update.weights(), "optimizer": self.update.state(), **self.averages.state()}
        groups = {name: self._good(tensors) for name, tensors in groups.items()}
        if self.world.main:
            self.saver.start(groups, self._writer(), private=("trainable", "optimizer") if self.update.gathers else ())
        if wait:
            self.saver.wait()
            self.world.wait()

    def _compare(self, what: str, tensors: dict[str, torch.Tensor]) -> None:
        """Raises UserError unless all processes hold the same bytes."""
        if self.world.size > 1:
            self.world.same({f"checksum of the {what} at step {self.step}": tensors_checksum(tensors)})

    def _writer(self) -> Callable[[dict[str, dict[str, torch.Tensor]]], object]:
        """What writes the state of this step, whenever it is called."""
        folder, step, keep = self.run.checkpoints, self.step, self.recipe.checkpoint.keep
        facts = {"skipped": self.skipped, "guard": self.guard.state(), "unfinished": self.unfinished}
        facts |= {"recipe": self.recipe.resolved(), "saved_at": time.time()}
        return lambda tensors: save_checkpoint(folder, step, tensors, facts, keep)

    def export(self) -> Path | None:
        """The finished network as a model folder, when the whole network was trained; whole or not at all."""
        if self.model.adapter is not None:
            return None
        with self.update.whole():
            if self.world.main and exported_step(self.run.model) != self.step:
                export_model(self.model, self.run.model, self.step, self.recipe)
        return self.run.model


def _due(every: int, step: int, last: bool) -> bool:
    return bool(every) and (last or step % every == 0)


def _update(recipe: Recipe, plan: Plan, model: Model, world: World) -> Update:
    """The way of stepping that ``world.engine`` stands for."""
    if world.engine not in ("zero2", "zero3"):
        return WholeUpdate(recipe, plan, model, world)
    from dedistill.training.zero import ZeroUpdate  # DeepSpeed is imported by those who use it

    return ZeroUpdate(recipe, model, world)
