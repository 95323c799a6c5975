"""Snapshots of a run, checksummed files in a chain, and weighted sums of any number of them in one pass."""

import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dedistill.errors import UserError, amount
from dedistill.io.atomic import allow_open_files, make_folder, step_name, step_of
from dedistill.io.safetensors import ChecksummedReader, Layout, TensorFile, verify_checksum

# --- snapshots of a run ----------------------------------------------------------------------------------------------


PREVIOUS = "dedistill.previous"
"""Header entry: name and hash of the snapshot before; empty in the first."""


@dataclass(frozen=True)
class Snapshot:
    step: int
    path: Path
    checksum: str
    """Hash of the file's bytes, as its header tells it."""
    previous: str


def write_snapshot(folder: Path, step: int, tensors: Mapping[str, Tensor], header: dict[str, str]) -> Path:
    """Write ``folder/step-XXXXXXXX.safetensors``, tensor by tensor, whole or not at all, in the place of an earlier one.

    Raises UserError naming the path when the disk refuses.
    """
    make_folder(folder)
    before = [number for number in _steps(folder) if number < step]
    link = _link_of(_path(folder, before[-1])) if before else ""
    path, layout = _path(folder, step), {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    with TensorFile(path, layout, header | {PREVIOUS: link, "dedistill.step": str(step)}, checksum=True) as file:
        for name, tensor in tensors.items():
            file.write(name, tensor)
    return path


def find_snapshots(folder: Path, skip: Collection[int] = ()) -> list[Snapshot]:
    """The snapshots in ``folder`` in the order of their steps, without those of the steps ``skip``.

    Raises UserError naming the snapshot when one is unreadable, missing between others, or of another run than its
    neighbours, when a step to skip is unknown, and when fewer than two are left.
    """
    steps = _steps(folder)
    found = [_opened(_path(folder, step), step) for step in steps if step not in skip]
    named = {step_of(Path(s.previous.partition(" ")[0])) for s in found}
    if unknown := sorted(set(skip) - set(steps) - named):
        raise UserError(f"--skip {unknown[0]}: '{folder}' has no snapshot of this step, and none is missing", 2)
    if len(found) < 2:
        raise UserError(
            f"'{folder}' holds {amount(len(found), 'snapshot')}; an average needs at least two (set snapshot.every)"
        )
    for before, snapshot in zip([None, *found], found):
        _check_link(before, snapshot, skip)
    return found


def _check_link(before: Snapshot | None, snapshot: Snapshot, skip: Collection[int]) -> None:
    """Raise UserError unless ``snapshot`` was written after ``before``, or after one that is to be skipped."""
    name = snapshot.previous.partition(" ")[0]
    step = step_of(Path(name)) if name else None
    if snapshot.previous == (_link(before) if before else "") or step in skip:
        return
    for neighbour in filter(None, (before, snapshot)):
        verify_checksum(neighbour.path)  # a changed header is damage, and says nothing of what there was
    if step is not None and step > (before.step if before else -1):
        missing = snapshot.path.with_name(name)
        raise UserError(
            f"snapshot '{missing}' is missing: '{snapshot.path}' was written after it. Restore it, or average the others "
            f"with --skip {step}"
        )
    other = f"'{before.path}'" if before else "nothing"
    raise UserError(
        f"'{snapshot.path}' was not written after {other} as it is now: one of them is of another run, or of another "
        f"attempt at this one. Restore the right one, or leave the wrong one out (--skip {snapshot.step})"
    )


def _link(snapshot: Snapshot) -> str:
    return f"{snapshot.path.name} {snapshot.checksum}"


def _link_of(path: Path) -> str:
    """How the next snapshot names this one. Training does not end over an unreadable one; averaging will."""
    with suppress(UserError):
        if (step := step_of(path)) is not None:
            return _link(_opened(path, step))
    return f"{path.name} unreadable"


def _opened(path: Path, step: int) -> Snapshot:
    with ChecksummedReader(path) as file:
        named = file.metadata.get("dedistill.step")
        if named != str(step):
            raise UserError(f"'{path}' says that it is of step {named}: it has been renamed, or is of another run")
        return Snapshot(step, path, file.checksum, file.metadata.get(PREVIOUS, ""))


def _path(folder: Path, step: int) -> Path:
    return folder / f"{step_name(step)}.safetensors"


def _steps(folder: Path) -> list[int]:
    found = (step_of(p) for p in folder.glob("step-*.safetensors"))
    return sorted(step for step in found if step is not None)


# --- weighted sums of snapshots --------------------------------------------------------------------------------------


CHUNK = 1 << 16
"""Numbers of a tensor averaged at a time; with twenty inputs a few megabytes, about what a processor keeps near."""


@dataclass(frozen=True)
class Average:
    """One output: the weights of the snapshots, which add up to 1, and what made them."""

    path: Path
    weights: np.ndarray
    made_by: str

    def header(self, last: dict[str, str], snapshots: Sequence[Snapshot]) -> dict[str, str]:
        """That of the last snapshot, and every input with its hash and weight."""
        parts = [
            {"file": f"{s.path.parent.name}/{s.path.name}", "sha256": s.checksum, "weight": float(w)}
            for s, w in zip(snapshots, self.weights)
        ]
        kept = {k: v for k, v in last.items() if k != PREVIOUS}
        return kept | {"format": "pt", "dedistill.ema": self.made_by, "dedistill.ema_inputs": json.dumps(parts)}


def write_averages(snapshots: Sequence[Snapshot], averages: Sequence[Average]) -> list[Path]:
    """Write the weighted sums of the snapshots' tensors, tensor by tensor; returns the files.

    Sums are float32 (float64 for float64) and rounded once to the inputs' dtype; ``.alpha`` buffers are copied. Memory is
    one chunk of every input and output. Raises UserError naming the snapshot, and nothing is written, when names, shapes or
    dtypes differ, or when the bytes are not those that were written.
    """
    make_folder(averages[0].path.parent)
    allow_open_files(len(snapshots) + len(averages))
    with ExitStack() as stack:
        readers = [stack.enter_context(ChecksummedReader(s.path)) for s in snapshots]
        layout = agreed_layout(readers)
        writers = []
        for average in averages:
            header = average.header(readers[-1].metadata, snapshots)
            writers.append(stack.enter_context(TensorFile(average.path, layout, header, checksum=True)))
        pool = stack.enter_context(ThreadPoolExecutor(os.cpu_count()))  # reading, hashing and writing are most of the work
        for name, rows in _sums(readers, layout, np.stack([a.weights for a in averages]), pool):
            list(pool.map(lambda writer, row, name=name: writer.write(name, row), writers, rows))
        for reader in readers:
            reader.finish()
    return [a.path for a in averages]


def _sums(
    readers: list[ChecksummedReader], layout: Layout, weights: np.ndarray, pool: ThreadPoolExecutor
) -> Iterator[tuple[str, Tensor]]:
    """(name, weighted sums [outputs, up to CHUNK]) through all tensors in the order of the files."""
    for name, (shape, dtype) in layout.items():
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        mix, left = torch.from_numpy(weights).to(wide), torch.Size(shape).numel()
        while left:
            size = min(left, CHUNK)
            rows = torch.empty(len(readers), size, dtype=dtype)
            list(pool.map(partial(read_finite, name=name), readers, rows))
            # alpha is a constant of the format, not a weight
            yield name, rows[-1:].expand(len(weights), -1) if is_constant(name) else (mix @ rows.to(wide)).to(dtype)
            left -= size


def read_finite(reader: ChecksummedReader, part: Tensor, name: str) -> None:
    """The next numbers of tensor ``name``. Raises UserError for NaN and Inf, which would spoil every average."""
    reader.read_into(part)
    if not part.isfinite().all():
        raise UserError(f"snapshot '{reader.path}': tensor '{name}' is not finite: leave that snapshot out")


def is_constant(name: str) -> bool:
    return name.endswith(".alpha")


def agreed_layout(readers: Sequence[ChecksummedReader]) -> Layout:
    """Names, shapes and dtypes of the tensors, in the order of the bytes. Raises UserError unless all files agree."""
    wanted, first = readers[0].layout, readers[0].path
    for reader in readers[1:]:
        found = reader.layout
        if odd := sorted(n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n)):
            raise UserError(
                f"snapshot '{reader.path}' differs from '{first}' in {amount(len(odd), 'tensor')}, e.g. {odd[0]}: "
                f"{found.get(odd[0], 'missing')} against {wanted.get(odd[0], 'missing')}. They are not of one run."
            )
        if list(found) != list(wanted):
            raise UserError(f"snapshot '{reader.path}' has its tensors in another order than '{first}': not of one run")
    if not wanted:
        raise UserError(f"snapshot '{first}' is empty")
    if odd := [f"{name} {dtype}" for name, (_, dtype) in wanted.items() if not dtype.is_floating_point]:
        raise UserError(f"snapshot '{first}' holds tensors that cannot be averaged, e.g. {odd[0]}")
    return wanted
