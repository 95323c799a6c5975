"""The training loop: slots of the global batch, one update per step, whatever model, adapter or objective."""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

from dedistill.assemble import Model
from dedistill.data.source import Source
from dedistill.engine.ahead import ahead
from dedistill.engine.checkpoint import newest_valid, read_checkpoint, save_checkpoint
from dedistill.engine.distillation import Meters
from dedistill.engine.export import export_model, exported_step
from dedistill.engine.gradients import gradients_for
from dedistill.engine.guards import FiniteGuard, NotFinite
from dedistill.engine.metrics import Record, Trackers
from dedistill.engine.objective import Objective, Task, task_loss
from dedistill.engine.optim import learning_rate, load_optimizer_tensors, make_optimizer, not_finite, optimizer_tensors
from dedistill.engine.preview import Preview
from dedistill.engine.rundir import RunDirectory
from dedistill.engine.saver import Saver
from dedistill.engine.stop import StopRequest
from dedistill.engine.validate import SAMPLES, Validator, sigma_bins
from dedistill.errors import UserError
from dedistill.files import make_folder, replace_file, step_name
from dedistill.recipe import Recipe, to_toml
from dedistill.recipe.plan import Plan
from dedistill.tensorfile import tensors_checksum
from dedistill.world import World, even_share

Tasks = Iterator[tuple[np.ndarray, Task] | None]
"""Positions and task of one micro-batch after the other; None where a step ends. No positions: the task counts for nothing."""


class Trainer:
    """Everything a run consists of. ``fit`` reads as the run goes."""

    def __init__(self, recipe: Recipe, plan: Plan, model: Model, source: Source, run: RunDirectory, world: World):
        """Every process of ``world`` has a trainer and trains; rank 0 alone writes into ``run``."""
        self.recipe, self.plan, self.model, self.run, self.world = recipe, plan, model, run, world
        self.objective = Objective(recipe, source, model.shift)
        self.trainable = model.trainable()
        self.optimizer = make_optimizer(recipe, self.trainable.values())
        self.gradients = gradients_for(list(self.trainable.values()), world, plan.batch, recipe.train.exact)
        self.guard, self.saver = FiniteGuard(), Saver()
        self.step = 0
        self.skipped = 0
        self.trained_now = False
        self.stopping = 0
        """The signal by which some process was asked to stop."""
        self.waited = 0.0
        """Seconds since the last line of timings.jsonl in which training stood still for data."""
        self.notes: list[str] = []
        every, samples = recipe.validate_.every, recipe.validate_.samples or SAMPLES
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
            "objective": self.objective.kind,
            "sigma": self.objective.sampling | {"shift": self.objective.shift_of(self.model.parts.picture)},
            "caption_dropout": self.objective.dropout,
            "optimizer": type(self.optimizer).__module__.split(".")[0] + "." + type(self.optimizer).__name__,
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
        name = self.world.from_main(found.name if self.world.main and found else None)
        if name is not None:
            self._read(self.run.checkpoints / name)
        self._compare("weights", self.trainable)

    def _read(self, checkpoint: Path) -> None:
        groups, manifest = read_checkpoint(checkpoint)
        self._compare("optimizer state", groups.get("optimizer", {}))
        self.model.load_tensors(groups["trainable"], str(checkpoint))
        load_optimizer_tensors(self.optimizer, self.trainable, groups.get("optimizer", {}), str(checkpoint))
        self.step, self.skipped, self.guard.in_a_row = manifest["step"], manifest["skipped"], manifest["skipped_in_a_row"]
        if self.step > self.plan.steps:
            raise UserError(f"'{checkpoint}' is at step {self.step}, train.steps is {self.plan.steps}: nothing is left to do")

    def fit(self, stop: StopRequest, trackers: Trackers) -> Iterator[dict]:
        """Train to the last step, yielding one row per step; returns early, saved, when a stop is asked for.

        Every process yields the same rows.
        """
        record = Record(self.run, self.step) if self.world.main else None
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
            for step in range(self.step, self.plan.steps):
                self.saver.check()
                row = self._guarded_step(step, tasks) | before
                before = {}
                self.step, self.trained_now = step + 1, True
                last = self.step == self.plan.steps
                if self.validate and (last or self.step % self.recipe.validate_.every == 0):
                    row |= self.validate(self.model)
                if self.meters and _due(self.recipe.meters.every, self.step, last):
                    row |= self.meters(self.model)
                if self.world.main and _due(self.recipe.snapshot.every, self.step, last):
                    self._snapshot()
                if self.preview and _due(self.recipe.preview.every, self.step, last):
                    self.preview(self.step)
                measured = not row.keys().isdisjoint(("val_loss", "guidance_gap"))
                if record and (step == 0 or measured or not row["applied"] or last or self._logged()):
                    record.write(row, self.waited)
                    self.waited = 0.0
                    trackers.log(row, self.step)
                if last or self.stopping or _due(self.recipe.checkpoint.every, self.step, last):
                    if record:
                        record.sync()
                    self._checkpoint(wait=last or self.stopping)
                yield row
                if self.stopping:
                    return
        finally:
            tasks.close()
            self.saver.close()
            if record:
                record.close()

    def _logged(self) -> bool:
        return self.step % self.recipe.log.every == 0

    def _tasks(self, start: int) -> Tasks:
        """Every micro-batch of this process, from step ``start`` on."""
        for step in range(start, self.plan.steps):
            own, company = self.objective.share(step, self.micro_batch, self.world)
            for positions in company:  # first, while there are no gradients yet that theirs could get into
                yield positions[:0], self.objective.task(step, positions)
            for positions in own:
                yield positions, self.objective.task(step, positions)
            yield None

    def _guarded_step(self, step: int, tasks: Tasks) -> dict:
        try:
            return self._train_step(step, tasks)
        except NotFinite:
            if self.trained_now:  # the weights are good: bad steps were not applied
                self._checkpoint(wait=True)
            raise

    def _train_step(self, step: int, tasks: Tasks) -> dict:
        """One optimizer step over all slots of the global batch; every sample weighs the same."""
        loss, sigma, bad = self._gradients(tasks)
        grad_norm = float(self._clip())
        lr = learning_rate(self.recipe, step)
        mean = float(loss.mean())
        applied = self.guard.allows(step, mean, grad_norm, bad)
        if applied:
            self._check_optimizer(step)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        else:
            self.skipped += 1
        self.optimizer.zero_grad(set_to_none=True)
        row = {"step": step + 1, "loss": mean, "lr": lr, "grad_norm": grad_norm, "applied": applied}
        if not applied:
            return {**row, "loss": str(mean), "grad_norm": str(grad_norm), "not_finite": bad}
        return row | {"sigma_mean": float(sigma.mean()), "sigma_loss": sigma_bins(loss, sigma, self.recipe.log.sigma_bins)}

    def _gradients(self, tasks: Tasks) -> tuple[torch.Tensor, torch.Tensor, list[dict]]:
        """Leave the gradient of the whole batch in place; (losses [B], sigmas [B], samples whose loss is not finite).

        What comes back is of all processes, in the order of positions, so that it does not depend on who did what.
        """
        slots, bad = [], []
        while (item := self._next(tasks)) is not None:
            positions, task = item
            loss = task_loss(self.model, task)  # one number per sample
            (loss.sum() / self.plan.batch).backward()
            if not len(positions):
                self.optimizer.zero_grad(set_to_none=True)
                continue
            self.gradients.add()
            done = list(zip(positions.tolist(), loss.tolist(), task.sigma.tolist()))
            slots += done
            bad += [(p, {"sample": n, "sigma": s}) for (p, value, s), n in zip(done, task.names) if not math.isfinite(value)]
        heard = self.world.gather({"slots": slots, "bad": bad, "stop": self.stop.asked()})
        self.stopping = max(h["stop"] for h in heard)
        self.gradients.finish()
        _, losses, sigmas = zip(*sorted(slot for h in heard for slot in h["slots"]))
        bad = [culprit for _, culprit in sorted((b for h in heard for b in h["bad"]), key=lambda b: b[0])]
        return torch.tensor(losses), torch.tensor(sigmas), bad

    def _next(self, tasks: Tasks) -> tuple[np.ndarray, Task] | None:
        start = time.monotonic()
        item = next(tasks)
        self.waited += time.monotonic() - start
        return item

    def _clip(self) -> torch.Tensor:
        limit = self.recipe.train.max_grad_norm or math.inf
        return torch.nn.utils.clip_grad_norm_(self.trainable.values(), limit, foreach=True)

    def _check_optimizer(self, step: int) -> None:
        """Raises UserError for a state that would spoil every weight it touches, however good the gradient."""
        if bad := not_finite(optimizer_tensors(self.optimizer, self.trainable)):
            raise UserError(
                f"before step {step + 1} the optimizer state holds {len(bad)} tensors that are not finite, e.g. {bad[0]}. "
                "The step was not applied; start again to go on from the last checkpoint."
            )

    def _good(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """``tensors`` to be saved. Raises UserError for those that a finite step has blown up."""
        if bad := not_finite(tensors):
            raise UserError(
                f"after step {self.step} {len(bad)} tensors are not finite, e.g. {bad[0]}; not saved. "
                "Lower train.lr or train.weight_decay; what was saved before is intact."
            )
        return tensors

    def _snapshot(self) -> None:
        make_folder(self.run.snapshots)
        header = snapshot_header(self.recipe, self.step)
        weights = self._good(self.model.tensors())
        replace_file(self.run.snapshots / f"{step_name(self.step)}.safetensors", save(weights, metadata=header))

    def _checkpoint(self, *, wait: bool) -> None:
        """Rank 0 saves beside training, after all have agreed on what. wait: until it is safe; nobody ends before that."""
        self._compare("weights", self.trainable)
        if self.world.main:
            state = {"trainable": self.model.tensors(copy=False)}
            state["optimizer"] = optimizer_tensors(self.optimizer, self.trainable)
            self.saver.start({name: self._good(tensors) for name, tensors in state.items()}, self._writer())
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
        facts = {"skipped": self.skipped, "skipped_in_a_row": self.guard.in_a_row}
        facts |= {"recipe": self.recipe.resolved(), "saved_at": time.time()}
        return lambda tensors: save_checkpoint(folder, step, tensors, facts, keep)

    def export(self) -> Path | None:
        """The finished network as a model folder, when the whole network was trained; whole or not at all."""
        if self.model.adapter is not None:
            return None
        if exported_step(self.run.model) != self.step:
            export_model(self.model, self.run.model, self.step, self.recipe)
        return self.run.model


def _due(every: int, step: int, last: bool) -> bool:
    return bool(every) and (last or step % every == 0)


def snapshot_header(recipe: Recipe, step: int) -> dict[str, str]:
    """What a sampler must know to use the weights; safetensors headers hold strings only."""
    return {
        "format": "pt",
        "dedistill.step": str(step),
        "dedistill.run": recipe.run.name,
        "dedistill.family": recipe.model.family,
        "dedistill.masked_attention": recipe.model.mask,
        "dedistill.sigma_density": recipe.timesteps.density,
        "dedistill.recipe": to_toml(recipe),
    }
