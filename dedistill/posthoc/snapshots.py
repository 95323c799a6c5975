"""Snapshots of a run: sealed files, each of which names the one before it, so that none can change or vanish unnoticed."""

from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dedistill.errors import UserError
from dedistill.files import make_folder, step_name, step_of
from dedistill.tensorfile import SealedReader, TensorFile, check_seal

PREVIOUS = "dedistill.previous"
"""Header entry: name and hash of the snapshot before; empty in the first."""


@dataclass(frozen=True)
class Snapshot:
    step: int
    path: Path
    seal: str
    """Hash of the file's bytes, as its header tells it."""
    previous: str


def write_snapshot(folder: Path, step: int, tensors: Mapping[str, Tensor], header: dict[str, str]) -> Path:
    """Write ``folder/step-XXXXXXXX.safetensors``, tensor by tensor, whole or not at all, in the place of an earlier one.

    Raises UserError naming the path when the disk refuses.
    """
    make_folder(folder)
    before = [number for number in _steps(folder) if number < step]
    link = _told(_path(folder, before[-1])) if before else ""
    path, layout = _path(folder, step), {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    with TensorFile(path, layout, header | {PREVIOUS: link, "dedistill.step": str(step)}, seal=True) as file:
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
        raise UserError(f"'{folder}' has and misses no snapshot of step {unknown[0]}", 2)
    if len(found) < 2:
        raise UserError(f"'{folder}' holds {len(found)} snapshots; an average needs at least two (set snapshot.every)")
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
        check_seal(neighbour.path)  # a changed header is damage, and says nothing of what there was
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
    return f"{snapshot.path.name} {snapshot.seal}"


def _told(path: Path) -> str:
    """How the next snapshot names this one. Training does not end over an unreadable one; averaging will."""
    with suppress(UserError):
        return _link(_opened(path, step_of(path)))
    return f"{path.name} unreadable"


def _opened(path: Path, step: int) -> Snapshot:
    with SealedReader(path) as file:
        told = file.metadata.get("dedistill.step")
        if told != str(step):
            raise UserError(f"'{path}' says that it is of step {told}: it has been renamed, or is of another run")
        return Snapshot(step, path, file.seal, file.metadata.get(PREVIOUS, ""))


def _path(folder: Path, step: int) -> Path:
    return folder / f"{step_name(step)}.safetensors"


def _steps(folder: Path) -> list[int]:
    found = [p for p in folder.glob("step-*.safetensors") if step_of(p) is not None]
    return sorted(step_of(p) for p in found)
