"""Checkpoints: a directory that is whole or is not there, and says so itself.

Files are hashed as they are written and synced, the manifest comes last, the directory is renamed into place and its
parent synced. Valid means: the manifest parses and every size and SHA-256 agrees. There is no pointer to the latest;
the newest valid one wins.
"""

import hashlib
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from dedistill.errors import UserError
from dedistill.io.atomic import (
    TEMPORARY,
    UNFINISHED,
    checksummed,
    read_checksummed,
    step_name,
    step_of,
    whole_folder,
    write_synced,
)
from dedistill.io.hashing import file_sha256
from dedistill.io.safetensors import TensorFile, open_safetensors

MANIFEST = "manifest.json"
SCHEMA = 2
"""2: with the state of the guard, and a validation that is still to be made."""


def save_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, object], *, keep: int
) -> Path:
    """Write ``folder/step-XXXXXXXX`` with one safetensors file per entry of ``tensors``; prune to ``keep`` good ones.

    Older checkpoints go only after the new one has been read back and verified. A failed write leaves nothing behind.
    A good one of this step is kept as it is: a step of a run has one result, and there is never a moment without it.
    """
    final = folder / step_name(step)
    if final.exists() and not damage(final):
        return final
    with whole_folder(final) as temporary:
        files = {}
        for name, group in tensors.items():
            files[f"{name}.safetensors"] = _write(temporary / f"{name}.safetensors", group, step)
        manifest = {"schema": SCHEMA, "step": step, **facts, "files": files}
        write_synced(temporary / MANIFEST, checksummed(manifest))
    if problem := damage(final):
        raise UserError(f"checkpoint '{final}' does not read back as written: {problem}. Older checkpoints are kept.")
    _prune(folder, keep)
    return final


def _write(path: Path, group: Mapping[str, Tensor], step: int) -> dict[str, int | str]:
    """Tensor by tensor: a whole file in memory would be one more copy, and made while training stands still."""
    digest, layout = hashlib.sha256(), {name: (tuple(t.shape), t.dtype) for name, t in group.items()}
    with TensorFile(path, layout, {"format": "pt", "step": str(step)}, digest) as file:
        for name, tensor in group.items():
            file.write(name, tensor)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _prune(folder: Path, keep: int) -> None:
    """Remove what is older than the ``keep`` newest good checkpoints; one that is rotten, or cannot be read, does not count."""
    good = 0
    for checkpoint in reversed(list_checkpoints(folder)):
        if good == keep:
            shutil.rmtree(checkpoint)
        elif _is_good(checkpoint):
            good += 1


def _is_good(checkpoint: Path) -> bool:
    """Whether it is known to be: for a save, which does not end over an older one that cannot be read."""
    with suppress(UserError):
        return not damage(checkpoint)
    return False


def list_checkpoints(folder: Path) -> list[Path]:
    """Published checkpoint directories, oldest first, damaged or not."""
    return list(_steps(folder))


def _steps(folder: Path) -> dict[Path, int]:
    """Published checkpoint directories, oldest first, and the step of each."""
    if not folder.is_dir():
        return {}
    steps = {p: step for p in folder.iterdir() if p.is_dir() and (step := step_of(p)) is not None}
    return dict(sorted(steps.items(), key=lambda item: item[1]))


def damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint, naming the file; empty when every byte agrees with the manifest.

    Raises UserError for one that this process may not read, or the disk fails to: it may be whole.
    """
    try:
        return _damage(checkpoint)
    except OSError as e:
        name = Path(str(e.filename or MANIFEST)).name
        raise UserError(
            f"checkpoint '{checkpoint}' cannot be read, so that nothing is known of it: {name}: {e.strerror or e}. Make it "
            "readable, or move it away to go on from the one before it"
        ) from e


def _damage(checkpoint: Path) -> str:
    try:
        manifest = read_checksummed(checkpoint / MANIFEST)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as e:
        return f"{MANIFEST} is unreadable ({e.strerror})"
    except ValueError as e:
        return f"{MANIFEST} {e}"
    if manifest.get("schema") != SCHEMA or manifest.get("step") != step_of(checkpoint):
        return f"{MANIFEST} is of another schema or step"
    if odd := _of_another_kind(manifest):
        return f"{MANIFEST} has {odd!r} of another kind than is written there"
    for name, entry in manifest["files"].items():
        path, size, digest = checkpoint / name, entry["bytes"], entry["sha256"]
        if path.is_dir() or not os.path.lexists(path):
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, {size} were written"
        if file_sha256(path) != digest:
            return f"{name} differs from what was written (SHA-256)"
    return ""


def _of_another_kind(manifest: dict[str, Any]) -> str:
    """The key of a manifest whose value is not of its kind; empty when all are."""
    kinds: dict[str, Any] = {"files": dict, "guard": dict, "skipped": int, "rows": int, "unfinished": dict | None}
    if wrong := [key for key, kind in kinds.items() if key in manifest and not isinstance(manifest[key], kind)]:
        return wrong[0]
    files = manifest.get("files", {})
    whole = all(isinstance(e, dict) and {"bytes", "sha256"} <= e.keys() and Path(n).name == n for n, e in files.items())
    return "" if files and whole else "files"


def newest_valid(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest good checkpoint, and a sentence about each newer, damaged one, which is set aside as ``*.bad``.

    Raises UserError when there are checkpoints but none is good: starting over in silence would lose the run.
    """
    notes: list[str] = []
    for checkpoint in reversed(list_checkpoints(folder)):
        _refuse_other_version(checkpoint)
        problem = damage(checkpoint)
        if not problem:
            return checkpoint, notes
        aside = checkpoint.with_name(f"{checkpoint.name}.bad")
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(checkpoint, aside)
        notes.append(f"checkpoint '{checkpoint}' is damaged: {problem}; set aside as '{aside.name}'")
    bad = sorted(folder.glob("step-*.bad")) if folder.is_dir() else []
    if bad:
        notes.append(f"no good checkpoint is left in '{folder}'. Restore one, or move the run directory away to start over.")
        raise UserError("\n".join(notes))
    return None, notes


def _refuse_other_version(checkpoint: Path) -> None:
    """Raises UserError for a whole manifest of another version of dedistill: it is not damaged, and not to be set aside."""
    try:
        schema = read_checksummed(checkpoint / MANIFEST).get("schema")
    except (OSError, ValueError):  # damage() says what is wrong
        return
    if schema != SCHEMA:
        raise UserError(
            f"checkpoint '{checkpoint}' is of another version of dedistill (schema {schema}, here {SCHEMA}). Go on with that "
            "version, or set another run.out."
        )


def newest_until(folder: Path, step: int) -> Path | None:
    """The newest good checkpoint of at most ``step``."""
    return next((c for c, own in reversed(_steps(folder).items()) if own <= step and not damage(c)), None)


def remove_after(folder: Path, step: int, keep: int = 0) -> None:
    """Remove checkpoints of later steps than ``step``, all but the ``keep`` newest: the run takes another course from there."""
    later = [c for c, own in _steps(folder).items() if own > step]
    for checkpoint in reversed(later[: len(later) - keep]):
        shutil.rmtree(checkpoint)


def read_checkpoint(checkpoint: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """({file stem: tensors}, manifest) of a checkpoint that :func:`damage` found good."""
    manifest = read_checksummed(checkpoint / MANIFEST)
    groups = {}
    for name in manifest["files"]:
        with open_safetensors(checkpoint / name) as f:
            groups[name.removesuffix(".safetensors")] = {key: f.get_tensor(key).clone() for key in f.keys()}  # noqa: SIM118
    return groups, manifest


def sweep_temporaries(folder: Path) -> None:
    """Remove what killed writes of a run left behind, at the places it writes. Only while holding the run's lock."""
    written = (
        *("checkpoints/step-*", "snapshots/step-*", "snapshots/ema_*/step-*", "model"),
        *("recipe.json", "recipe.toml", "recipe.resolved.toml", "plan.json", "inputs.json", "metrics.jsonl", "timings.jsonl"),
    )
    for path in (p for name in written for p in folder.glob(f"{name}{UNFINISHED}*") if TEMPORARY.search(p.name)):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
