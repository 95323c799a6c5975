"""What a run keeps and goes back to: its state, averages, checkpoints, snapshots and, at the end, its model folder."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from shutil import disk_usage
from typing import Any

import torch
from torch import Tensor

from dedistill.adapters.attach import compare_tensors
from dedistill.data.images.types import ImageSet
from dedistill.distributed.outside import heartbeat
from dedistill.errors import UserError, amount
from dedistill.io.safetensors import tensors_checksum
from dedistill.models.family import prediction_facts
from dedistill.models.model import ARITHMETIC
from dedistill.posthoc.profiles import exponent, profile_folder, share_of_new
from dedistill.posthoc.snapshots import write_snapshot
from dedistill.recipe import Recipe
from dedistill.runs.checkpoint import newest_until, newest_valid, read_checkpoint, remove_after, save_checkpoint
from dedistill.runs.directory import RunDirectory
from dedistill.runs.metrics import Row, last_step
from dedistill.runs.model import export_model, exported_step, snapshot_header
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


# --- averages of the weights ------------------------------------------------------------------------------------------


TIME = "time"
"""Name of the step of the last update among the tensors of a checkpoint."""


class Averages:
    """One running mean of every trained tensor for each of ``widths`` (sigma_rel): float32, where the tensor is.

    Updates are a function of the weights and the step alone, so every process that holds the same weights holds the same
    means. A step that was not applied makes none, but counts as time that has passed.
    """

    def __init__(self, widths: Sequence[float], trained: Mapping[str, Tensor]):
        self._trained, self._time = trained, 0
        self._gammas = {sigma: exponent(sigma) for sigma in widths}
        self._means = {s: {n: torch.zeros_like(t, dtype=torch.float32).detach() for n, t in trained.items()} for s in widths}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the weights in as they are after ``step``, with the weight of all the steps since the last update."""
        for sigma, means in self._means.items():
            share = share_of_new(self._gammas[sigma], self._time, step)
            for name, mean in means.items():
                # at the first update the share is 1, so the zeros that means start from never count
                mean.lerp_(self._trained[name].float(), share)
        self._time = step

    def state(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint keeps, by file; nothing when nothing is tracked."""
        return {"ema": {**dict(self._named()), TIME: torch.tensor(self._time)}} if self._means else {}

    def load(self, groups: Mapping[str, dict[str, Tensor]], source: str) -> None:
        """The inverse of :meth:`state`. Raises UserError naming ``source``, changing nothing, unless it holds these very
        means."""
        saved = groups.get("ema", {})
        if problems := compare_tensors(self.state().get("ema", {}), saved):
            raise UserError(f"the averages in '{source}' do not fit snapshot.ema: {problems}")
        for name, mean in self._named():
            mean.copy_(saved[name])
        self._time = int(saved[TIME]) if saved else 0

    def write(self, snapshots: Path, step: int, whole: Mapping[str, Tensor], header: dict[str, str]) -> None:
        """Write each average, as of ``step``, beside the snapshot of ``whole``, of which the trained tensors are replaced."""
        for sigma, means in self._means.items():
            made_by = {"dedistill.ema": f"power sigma_rel={sigma:g}"}
            if self._time < step:  # the last steps were not applied
                share = share_of_new(self._gammas[sigma], self._time, step)
                means = {name: mean.lerp(self._trained[name].detach().float(), share) for name, mean in means.items()}
            write_snapshot(snapshots / profile_folder(sigma), step, {**whole, **means}, header | made_by)

    def _named(self) -> list[tuple[str, Tensor]]:
        return [(f"{sigma:g}/{name}", mean) for sigma, means in self._means.items() for name, mean in means.items()]


# --- saving beside training ------------------------------------------------------------------------------------------


Groups = dict[str, dict[str, Tensor]]
"""Name of a file -> its tensors by name."""


class AsyncCheckpointWriter:
    """One save at a time. What goes wrong in one is raised by the next call of ``start`` or ``wait``.

    The memory of the copies is kept from save to save: to be given new memory takes longer than to copy into it.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._running: Future[object] | None = None
        self._copies: dict[tuple[str, str], Tensor] = {}

    def start(self, groups: Groups, save: Callable[[Groups], object], *, no_copy: Collection[str] = ()) -> None:
        """Run ``save`` on copies of ``groups`` on the CPU, beside what follows, after the save before has ended.

        no_copy: names of groups that need no copy, because they are nobody else's.
        """
        self.wait()
        copies = {g: ts if g in no_copy else {n: self._copy(g, n, t) for n, t in ts.items()} for g, ts in groups.items()}
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # copies into pinned memory do not wait by themselves
        self._running = self._pool.submit(save, copies)

    def _copy(self, group: str, name: str, tensor: Tensor) -> Tensor:
        own = self._copies.get((group, name))
        if own is None or own.shape != tensor.shape or own.dtype != tensor.dtype:
            own = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._copies[group, name] = own
        return own.copy_(tensor, non_blocking=True)

    def check(self) -> None:
        """Raise what a save that has ended has raised; waits for none."""
        if self._running and self._running.done():
            self.wait()

    def wait(self) -> None:
        """Until what was started is safe on disk."""
        running, self._running = self._running, None
        if running:
            with heartbeat.during("saving"):
                running.result()

    def close(self) -> None:
        """Wait, and raise nothing: for the end of a run that has failed already."""
        self._pool.shutdown()


# --- all of it on disk ---------------------------------------------------------------------------------------------------


def _title(images: Mapping[str, Any]) -> str:
    """What an entry of [[data.sets]] is called."""
    return ImageSet(images["path"], name=images["name"] or "").title


_ENTRY = 100
"""Bytes in a file's header for each of its tensors, about."""


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
        if self.world.main and self.state.step < self.recipe.train.steps:
            self._require_room()
        return notes

    def _require_room(self) -> None:
        """Raises UserError where not even the next save will fit: else that is found out after all the steps up to it."""
        weights, averages = self.engine.trainable, self.averages.state().get("ema", {})
        one, means = (sum(t.nbytes + _ENTRY for t in tensors.values()) for tensors in (weights, averages))
        snapshot = one + means if self.recipe.snapshot.every else 0
        checkpoint = 3 * one + means  # with Adam's two moments
        free = disk_usage(self.run.path).free
        if snapshot + checkpoint > free:
            what = "a checkpoint and a snapshot take" if snapshot else "a checkpoint takes"
            raise UserError(
                f"{self.recipe.where('run.out')}: {what} {(snapshot + checkpoint) / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are "
                f"free for '{self.run.path}'. Make room, or choose another disk"
            )

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

            def save(copies: Groups) -> None:
                self.run.require()  # it may have been moved since
                save_checkpoint(folder, step, copies, facts, keep=keep)

            self.writer.start(groups, save, no_copy=no_copy)
        if wait:
            self.writer.wait()
            self.world.wait()

    def snapshot(self) -> None:
        """Keep a copy of the weights, and one of each of their averages."""
        weights, step = self._good(self.engine.weights()), self.state.step
        if self.world.main:
            self.run.require()
            model = self.engine.model
            header = snapshot_header(self.recipe, step, prediction_facts(model.family.spec, model.components))
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
