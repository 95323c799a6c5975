"""The training loop: slots of the global batch, one update per step, whatever model, adapter or objective."""

import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save

from dedistill.assemble import Model
from dedistill.data.source import Source
from dedistill.engine.ahead import ahead
from dedistill.engine.checkpoint import newest_valid, read_checkpoint, save_checkpoint
from dedistill.engine.export import export_model, exported_step
from dedistill.engine.guards import FiniteGuard, NotFinite
from dedistill.engine.metrics import Clock, Journal, Trackers
from dedistill.engine.objective import Objective, Task, task_loss
from dedistill.engine.optim import learning_rate, load_optimizer_tensors, make_optimizer, optimizer_tensors
from dedistill.engine.preview import Preview
from dedistill.engine.rundir import RunDirectory
from dedistill.engine.stop import StopRequest
from dedistill.engine.validate import SAMPLES, Validator, sigma_bins
from dedistill.errors import UserError
from dedistill.files import replace_file, step_name
from dedistill.recipe import Recipe, to_toml
from dedistill.recipe.plan import Plan


class Trainer:
    """Everything a run consists of. ``fit`` reads as the run goes."""

    def __init__(self, recipe: Recipe, plan: Plan, model: Model, source: Source, run: RunDirectory):
        self.recipe, self.plan, self.model, self.run = recipe, plan, model, run
        self.objective = Objective(recipe, source, model.shift)
        self.trainable = model.trainable()
        self.optimizer = make_optimizer(recipe, self.trainable.values())
        self.guard = FiniteGuard()
        self.step = 0
        self.skipped = 0
        self.trained_now = False
        self.waited = 0.0
        """Seconds since the last line of timings.jsonl in which training stood still for data."""
        self.notes: list[str] = []
        every, samples = recipe.validate_.every, recipe.validate_.samples or SAMPLES
        self.validate = Validator(self.objective, samples, model.chunk) if every else None
        self.preview = Preview(recipe, model, run.previews) if recipe.preview.every else None

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
        }

    def resume(self) -> None:
        """Continue from the newest good checkpoint, if there is one."""
        checkpoint, self.notes = newest_valid(self.run.checkpoints)
        if checkpoint is None:
            return
        groups, manifest = read_checkpoint(checkpoint)
        self.model.load_tensors(groups["trainable"], str(checkpoint))
        load_optimizer_tensors(self.optimizer, self.trainable, groups.get("optimizer", {}), str(checkpoint))
        self.step, self.skipped, self.guard.in_a_row = manifest["step"], manifest["skipped"], manifest["skipped_in_a_row"]
        if self.step > self.plan.steps:
            raise UserError(f"'{checkpoint}' is at step {self.step}, train.steps is {self.plan.steps}: nothing is left to do")

    def fit(self, stop: StopRequest, trackers: Trackers) -> Iterator[dict]:
        """Train to the last step, yielding one row per step; returns early, saved, when a stop is asked for."""
        journal, timings, clock = Journal(self.run.metrics, self.step), Journal(self.run.timings, self.step), Clock()
        before = {}
        if self.step == 0 and self.validate:
            before = {f"{key}_start": value for key, value in self.validate(self.model).items()}
            clock.lap()
        if self.step == 0 and self.preview:
            self.preview(0)
            clock.lap()
        self.model.root.train()
        tasks = ahead(self._tasks(self.step))
        try:
            for step in range(self.step, self.plan.steps):
                row = self._guarded_step(step, tasks) | before
                before = {}
                self.step, self.trained_now = step + 1, True
                last = self.step == self.plan.steps
                if self.validate and (last or self.step % self.recipe.validate_.every == 0):
                    row |= self.validate(self.model)
                if _due(self.recipe.snapshot.every, self.step, last):
                    self._snapshot()
                if self.preview and _due(self.recipe.preview.every, self.step, last):
                    self.preview(self.step)
                if step == 0 or "val_loss" in row or not row["applied"] or last or self.step % self.recipe.log.every == 0:
                    journal.write(row)
                    timings.write({"step": self.step, "seconds": round(clock.lap(), 4), "waited": round(self.waited, 4)})
                    self.waited = 0.0
                    trackers.log(row, self.step)
                stopping = stop.asked()  # asked once: a signal after this line waits for the next step
                if last or stopping or _due(self.recipe.checkpoint.every, self.step, last):
                    self._checkpoint()
                yield row
                if stopping:
                    return
        finally:
            tasks.close()
            journal.close()
            timings.close()

    def _tasks(self, start: int) -> Iterator[Task]:
        """Every micro-batch of the run from step ``start`` on."""
        for step in range(start, self.plan.steps):
            for positions in self.objective.micro_batches(step, self.plan.micro_batch):
                yield self.objective.task(step, positions)

    def _guarded_step(self, step: int, tasks: Iterator[Task]) -> dict:
        try:
            return self._train_step(step, tasks)
        except NotFinite:
            if self.trained_now:  # the weights are good: bad steps were not applied
                self._checkpoint()
            raise

    def _train_step(self, step: int, tasks: Iterator[Task]) -> dict:
        """One optimizer step over all slots of the global batch; every sample weighs the same."""
        losses, sigmas, names = [], [], []
        while len(names) < self.plan.batch:
            task = self._next(tasks)
            loss = task_loss(self.model, task)  # one number per sample
            (loss.sum() / self.plan.batch).backward()
            losses.append(loss.detach().cpu())
            sigmas.append(task.sigma)
            names += task.names
        loss, sigma = torch.cat(losses), torch.cat(sigmas)
        grad_norm = float(self._clip())
        lr = learning_rate(self.recipe, step)
        mean = float(loss.mean())
        bad = [{"sample": names[i], "sigma": float(sigma[i])} for i in torch.nonzero(~loss.isfinite()).flatten().tolist()]
        applied = self.guard.allows(step, mean, grad_norm, bad)
        if applied:
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

    def _next(self, tasks: Iterator[Task]) -> Task:
        start = time.monotonic()
        task = next(tasks)
        self.waited += time.monotonic() - start
        return task

    def _clip(self) -> torch.Tensor:
        limit = self.recipe.train.max_grad_norm or math.inf
        return torch.nn.utils.clip_grad_norm_(self.trainable.values(), limit, foreach=True)

    def _weights(self) -> dict[str, torch.Tensor]:
        """Private copies of what is trained; refuses to hand out weights that a finite step has blown up."""
        tensors = self.model.tensors()
        if bad := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
            raise UserError(
                f"after step {self.step} {len(bad)} trained tensors are not finite, e.g. {bad[0]}; not saved. "
                "Lower train.lr or train.weight_decay; what was saved before is intact."
            )
        return tensors

    def _snapshot(self) -> None:
        self.run.snapshots.mkdir(exist_ok=True)
        header = snapshot_header(self.recipe, self.step)
        replace_file(self.run.snapshots / f"{step_name(self.step)}.safetensors", save(self._weights(), metadata=header))

    def _checkpoint(self) -> None:
        groups = {"trainable": self._weights(), "optimizer": optimizer_tensors(self.optimizer, self.trainable)}
        facts = {"skipped": self.skipped, "skipped_in_a_row": self.guard.in_a_row}
        facts |= {"recipe": self.recipe.resolved(), "saved_at": time.time()}
        save_checkpoint(self.run.checkpoints, self.step, groups, facts, self.recipe.checkpoint.keep)

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
