"""What a run keeps and goes back to: its state, checkpoints, snapshots and, at the end, its model folder."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dedistill.data.images.types import ImageSet
from dedistill.errors import UserError, amount
from dedistill.io.safetensors import tensors_checksum
from dedistill.models.model import ARITHMETIC
from dedistill.posthoc.snapshots import write_snapshot
from dedistill.recipe import Recipe
from dedistill.runs.checkpoint import newest_until, newest_valid, read_checkpoint, remove_after, save_checkpoint
from dedistill.runs.directory import RunDirectory
from dedistill.runs.metrics import Row, last_step
from dedistill.runs.model import export_model, exported_step, snapshot_header
from dedistill.training.background import AsyncCheckpointWriter
from dedistill.training.ema import Averages
from dedistill.training.engine import Engine
from dedistill.training.guards import Guard, of_renamed_sets
from dedistill.training.optim import not_finite


@dataclass
class RunState:
    """Where a run stands beside its tensors: saved, loaded and rolled back as one, the same on every process."""

    guard: Guard
    """What steps are judged by, and the quarantine, which is what came of it."""
    step: int = 0
    """Steps done, applied or not."""
    skipped: int = 0
    """Those of them that were not applied."""
    rows: int = 0
    """Rows of metrics.jsonl up to here."""
    unfinished: Row | None = None
    """The row of the last step, where a stop came before its validation."""

    def saved(self) -> dict[str, object]:
        """Plain data, nobody else's, under the keys that a checkpoint's manifest has."""
        counts = {"step": self.step, "skipped": self.skipped, "rows": self.rows}
        return {**counts, "guard": self.guard.state(), "unfinished": self.unfinished}

    def load(self, saved: Mapping[str, Any]) -> None:
        """The inverse of ``saved``; other keys are left alone."""
        self.step, self.skipped, self.unfinished = saved["step"], saved["skipped"], saved["unfinished"]
        self.rows = saved.get("rows", 0)  # of an earlier version: not known
        self.guard.load(saved["guard"])

    def roll_back(self, since: int, saved: Mapping[str, Any] | None) -> None:
        """To ``saved``, or without it to step ``since``, after which nothing was applied. What was found out since stays
        known: the quarantine, and how often the run has gone back."""
        judged = self.guard.state()
        undone = self.step - since  # each of them has a row, since it was not applied
        self.step, self.skipped, self.rows = since, self.skipped - undone, self.rows - undone
        if saved is not None:
            self.load(saved)
        self.guard.load({key: judged[key] for key in ("quarantine", "returned")})
        self.unfinished = None  # its row was written since


def _title(images: Mapping[str, Any]) -> str:
    """What an entry of [[data.sets]] is called."""
    return ImageSet(images["path"], name=images["name"] or "").title


class Keeper:
    """Keeps a run on disk. Every process calls every method; rank 0 alone writes."""

    def __init__(self, recipe: Recipe, run: RunDirectory, engine: Engine, state: RunState):
        """Of the state, and of the tensors that ``engine`` trains together with their averages."""
        self.recipe, self.run, self.engine, self.world, self.state = recipe, run, engine, engine.world, state
        self.averages = Averages(recipe.snapshot.ema or [], engine.trainable)
        self.writer = AsyncCheckpointWriter()

    def resume(self) -> list[str]:
        """Continue from the newest good checkpoint, if there is one. Every process ends up with the same state.

        Returns what a user should know of damaged ones.
        """
        found: Path | None = None
        notes: list[str] = []
        if self.world.main:
            found, notes = newest_valid(self.run.checkpoints)
            every, reached = self.recipe.checkpoint.every, last_step(self.run.metrics)
            if found is None and every and reached > 2 * every:  # the second save waits for the first
                raise UserError(
                    f"'{self.run.metrics}' goes up to step {reached}, but there is no checkpoint in '{self.run.checkpoints}'. "
                    "Restore one, or move the run directory away to start over."
                )
        name = self.world.broadcast_object(found.name if found else None)
        if name is not None:
            manifest = self._read(self.run.checkpoints / name)
            self.state.load(manifest)
            if (made := manifest.get("arithmetic", 1)) != ARITHMETIC and self.engine.model.adapter:
                notes.append(
                    f"until step {self.state.step} this run was trained by a version whose adapters round otherwise "
                    f"(arithmetic {made}, here {ARITHMETIC}): it goes on, and differs from that version by rounding"
                )
        self._compare("weights", self.engine.replicated_params())
        return notes

    def _read(self, checkpoint: Path) -> dict[str, Any]:
        """Load the tensors; the manifest."""
        groups, manifest = read_checkpoint(checkpoint)
        self._compare("optimizer state", groups.get("optimizer", {}), manifest["step"])
        self.engine.load(groups["trainable"], groups.get("optimizer", {}), str(checkpoint))
        self.averages.load(groups, str(checkpoint))
        if manifest["step"] > self.recipe.train.steps:
            raise UserError(
                f"'{checkpoint}' is at step {manifest['step']}, train.steps is {self.recipe.train.steps}: nothing is left to do"
            )
        before = manifest.get("recipe", {}).get("data", {}).get("sets", ())
        titles = [(_title(old), _title(new)) for old, new in zip(before, self.recipe.resolved()["data"]["sets"])]
        return manifest | {"guard": of_renamed_sets(manifest["guard"], dict(titles))}

    def roll_back(self, since: int) -> None:
        """Back to the newest good checkpoint of at most ``since`` steps, without those after it, with today's quarantine.

        Without such a one: to ``since`` itself, which is saved; its weights are the present ones, since nothing was applied
        after it. Either way the same steps come of it: no sample is left out before ``since``.
        """
        folder = self.run.checkpoints
        self.writer.wait()
        found = newest_until(folder, since) if self.world.main else None
        name = self.world.broadcast_object(found.name if found else None)
        if self.world.main:
            remove_after(folder, since, keep=0 if name else 1)  # at any instant there is one to go on from
        self.engine.discard()
        self.state.roll_back(since, self._read(folder / name) if name is not None else None)
        if name is None:
            self.checkpoint(wait=True)
        if self.world.main:
            remove_after(folder, since)

    def checkpoint(self, *, wait: bool) -> None:
        """Rank 0 saves beside training, after all have agreed on what. wait: until it is safe; nobody ends before that."""
        self._compare("weights", self.engine.replicated_params())
        groups = {"trainable": self.engine.weights(), "optimizer": self.engine.state(), **self.averages.state()}
        groups = {name: self._good(tensors) for name, tensors in groups.items()}
        if self.world.main:
            self.run.require()
            now = {"recipe": self.recipe.resolved(), "saved_at": time.time(), "arithmetic": ARITHMETIC}
            facts = self.state.saved() | now
            folder, step, keep = self.run.checkpoints, self.state.step, self.recipe.checkpoint.keep
            no_copy = ("trainable", "optimizer") if self.engine.gathers else ()
            self.writer.start(groups, lambda copies: save_checkpoint(folder, step, copies, facts, keep=keep), no_copy=no_copy)
        if wait:
            self.writer.wait()
            self.world.wait()

    def snapshot(self) -> None:
        """Keep a copy of the weights, and one of each of their averages."""
        weights, step = self._good(self.engine.weights()), self.state.step
        if self.world.main:
            self.run.require()
            header = snapshot_header(self.recipe, step, self.engine.model.components.schedule)
            write_snapshot(self.run.snapshots, step, weights, header)
            self.averages.write(self.run.snapshots, step, weights, header)

    def export(self) -> Path | None:
        """The finished network as a model folder, when the whole network was trained; whole or not at all."""
        model = self.engine.model
        if model.adapter is not None:
            return None
        with self.engine.gathered_params():
            if self.world.main and exported_step(self.run.model) != self.state.step:
                export_model(model, self.run.model, self.state.step, self.recipe)
        return self.run.model

    def _good(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """``tensors`` to be saved. Raises UserError, on every process, for those that a finite step has blown up."""
        if bad := self.world.broadcast_object(not_finite(tensors)):
            raise UserError(
                f"after step {self.state.step} {amount(len(bad), 'tensor is', 'tensors are')} not finite, e.g. {bad[0]}; "
                "not saved. Lower train.lr or train.weight_decay; what was saved before is intact."
            )
        return tensors

    def _compare(self, what: str, tensors: Mapping[str, Tensor], step: int | None = None) -> None:
        """Raises UserError unless all processes hold the same bytes."""
        if self.world.size > 1:
            step = self.state.step if step is None else step
            self.world.assert_equal_on_all_ranks({f"checksum of the {what} at step {step}": tensors_checksum(tensors)})
