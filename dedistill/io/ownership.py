"""What is the user's and what is ours: nothing is removed or replaced that this program did not make.

A folder to write in is ours, or has nothing under a name that will be written there. Ours has a file ``.dedistill``, which is
put there first of all; those of earlier versions hold what only this program writes. A name is no such sign: ``00000.tar``,
``index.html`` and ``RUN-rehearsal`` are names that others use, too. Everything else is refused before a byte of it changes.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TextIO

from dedistill.errors import UserError
from dedistill.io.atomic import make_folder, replace_file

MARK = ".dedistill"
_NOTE = "dedistill made this folder and writes in it.\n"


@dataclass(frozen=True)
class Kind:
    """words: what such a folder is. sign: file that tells it without a mark, JSON with ``keys`` or text with ``text``.

    writes: patterns of the names in it that are written and removed; what has another name may be there, and stays.
    """

    words: str
    sign: str
    keys: tuple[str, ...] = ()
    text: str = ""
    writes: tuple[str, ...] = ("*",)


_PAGE = ("index.html", "thumbs", "images", "sheets")
_RUN = (
    *("recipe.json", "recipe.toml", "recipe.resolved.toml", "plan.json", "inputs.json", "metrics.jsonl", "timings.jsonl"),
    *("checkpoints", "snapshots", "previews", "model", "posthoc", "save", "sample", "stop", "stacks-rank-*.txt"),
)
_CACHE = ("index.jsonl", "duplicates.json", "hashes.json", "quarantine.txt", "latents", "text", "stacks-rank-*.txt")
KINDS = {
    "run": Kind("a run", "recipe.json", ("run", "model", "data", "train"), writes=_RUN),
    "rehearsal": Kind("a rehearsal", "rehearsal.log", text="== the plan can be reached\n"),
    "chain": Kind("a chain", "chain.json", ("stages",)),
    "cache": Kind("a cache of encoded data", "index.jsonl", ("format", "complete", "limits", "sources"), writes=_CACHE),
    "pairs": Kind("a set of pairs", "pairs.json", ("teacher", "sigmas", "shards"), writes=("*.tar", "pairs.json", *_PAGE)),
    "sweep": Kind(
        "a sweep", "scores.json", ("title", "settings", "numbers", "cells"), writes=("index.json", "scores.json", *_PAGE)
    ),
    "evaluation": Kind("an evaluation", "evaluation.json", ("answers", "losses", "chosen"), writes=("evaluation.json", *_PAGE)),
    "distillation": Kind(
        "a measurement of distillation",
        "distillation.json",
        ("reference", "meters", "candidates"),
        writes=("distillation.json", "answers", *_PAGE),
    ),
    "selection": Kind("a selection", "selection.json", ("numbers", "cells", "chosen"), writes=("selection.json", *_PAGE)),
    "influence": Kind(
        "a measurement of influence",
        "influence.json",
        ("prompts", "sigmas", "budget", "blocks"),
        writes=("influence.json", "influence.toml", *_PAGE),
    ),
    "inversion": Kind(
        "an inversion of an image",
        "inversion.json",
        ("source", "decoded", "cells"),
        writes=("inversion.json", "*.safetensors", *_PAGE),
    ),
    "scan": Kind("a scan of data", "scan.json", ("sources", "near_duplicates"), writes=("scan.json", "index.jsonl", *_PAGE)),
    "report": Kind("a report of a run", "index.html", text='<link rel="icon" href="data:,">\n<title>Run: ', writes=_PAGE),
    "story": Kind("a story's report", "summary.json", ("teacher", "dedistilled")),
}


def refuse_foreign(folder: Path, kind: str, key: str, kept: Iterable[Path] = ()) -> None:
    """Raises UserError unless ``folder`` can be made, is of ``kind`` and ours, or has nothing in the way; changes nothing.

    key: what names the folder, a recipe's key with its place or an option. kept: files that may be there although they are
    the user's, since nobody will write over them. Hidden files, and folders inside that are ours, count as nothing.
    """
    there = next((place for place in (folder, *folder.parents) if os.path.lexists(place)), folder)
    if os.path.lexists(there) and not os.path.isdir(there):
        what = "a file" if there.is_file() else "no folder"
        raise UserError(f"{key}: '{there}' is {what}, and a folder is needed there; choose another place, or move it away")
    found = kind_of(folder)
    if found == kind or (found is None and _known_without(folder, kind)):
        return
    if found is not None:
        raise UserError(f"{key}: '{folder}' is {KINDS[found].words}, not {KINDS[kind].words}; choose another folder")
    kept = tuple(kept)
    if other := next(_foreign(folder, kept, KINDS[kind].writes), None):
        raise UserError(
            f"{key}: '{folder}' holds '{other.relative_to(folder)}', which dedistill did not make and might write over, and is "
            f"left as it is. Choose another folder. If an earlier version made it: echo {kind} > '{folder / MARK}'"
        )


def claim(folder: Path, kind: str, key: str) -> None:
    """Make ``folder`` and mark it, unless it is ours already. Raises as :func:`refuse_foreign`, or when the disk refuses."""
    refuse_foreign(folder, kind, key)
    make(folder)
    mark(folder, kind)


_made: list[Path] = []
"""Folders that the command has made so far, what they lie in after them."""
_BEGINNINGS = {MARK, ".lock", "recipe.json", "recipe.toml", "recipe.resolved.toml"}
"""What is written first of all into a folder."""


def make(folder: Path) -> None:
    """Make ``folder`` and what is missing above it; where nothing comes of the command, they go again."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    make_folder(folder)
    _made.extend(path.absolute() for path in missing)


def drop_beginnings(*, failed: bool) -> None:
    """At the end of a command: forget what it has made, and where it ``failed``, remove folders that were only begun."""
    made = [*_made]
    _made.clear()
    for folder in made if failed else ():
        with suppress(OSError, UserError):
            refuse_busy(folder, "folder")
            if all(path.name in _BEGINNINGS for path in folder.iterdir()):
                for path in folder.iterdir():
                    path.unlink()
                folder.rmdir()


def mark(folder: Path, kind: str) -> None:
    """Say in ``folder`` that it is ours; to be called when nothing foreign is in it."""
    if kind_of(folder) == kind:
        return
    try:
        replace_file(folder / MARK, f"{kind}\n{_NOTE}".encode())
    except UserError:
        if not _known_without(folder, kind):  # else it may be one of an earlier version that is only read
            raise


def hold(folder: Path, key: str) -> TextIO:
    """The lock of a folder in which one process at a time may work, held until the file is closed. Raises UserError while
    another has it, and OSError. key: what names the folder."""
    lock = open(folder / ".lock", "a")  # noqa: SIM115 - the caller closes it
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        lock.close()
        raise UserError(f"another process is running in '{folder}'; wait for it, or choose another {key}") from e
    return lock


def refuse_busy(folder: Path, key: str) -> None:
    """Raises UserError while another process holds ``folder``; makes nothing. The first look, before libraries are loaded."""
    with suppress(OSError):  # whoever is to write there says what is wrong
        if (folder / ".lock").exists():
            hold(folder, key).close()


def kind_of(folder: Path) -> str | None:
    """The kind that the mark in ``folder`` names; None without one."""
    found = _text(folder / MARK, lines=1).strip()
    return found if found in KINDS else None


def written_in(folder: Path) -> Callable[[str], bool]:
    """Whether something of a name in ``folder`` is what this program writes there."""
    kind = kind_of(folder)
    return partial(_named, KINDS[kind].writes if kind else ())


def _named(patterns: tuple[str, ...], name: str) -> bool:
    """Patterns are in small letters, since some disks do not tell these from capitals."""
    return any(fnmatchcase(name.lower(), pattern) for pattern in patterns)


def remove(path: Path) -> None:
    """Remove a file, a folder, or a link but not what it leads to; nothing when there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def same_file(path: Path, others: Iterable[Path]) -> bool:
    """Whether ``path`` is one of ``others``, however they are spelt or linked."""
    with suppress(OSError):
        return any(os.path.samefile(path, other) for other in others if other.exists())
    return False


def _known_without(folder: Path, kind: str) -> bool:
    """Whether ``folder`` holds what only this program writes into one of ``kind``."""
    sign = KINDS[kind]
    text = _text(folder / sign.sign, lines=1 if sign.sign.endswith(".jsonl") else None)
    if sign.text:
        return sign.text in text
    try:
        table = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(table, dict) and table.keys() >= set(sign.keys)


def _text(file: Path, lines: int | None = None) -> str:
    """The text of a file, or its first lines; empty when it cannot be read."""
    try:
        with open(file, encoding="utf-8") as f:
            return "".join(islice(f, lines))
    except (OSError, ValueError):
        return ""


def _foreign(folder: Path, kept: tuple[Path, ...], names: tuple[str, ...] = ("*",)) -> Iterator[Path]:
    """Files in ``folder`` that are neither hidden, nor among ``kept``, nor in folders of ours. names: patterns of theirs."""
    for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
        if entry.name != MARK and not _named(names, entry.name):
            continue
        if entry.is_dir() and not entry.is_symlink():
            if not entry.name.startswith(".") and kind_of(entry) is None:
                yield from _foreign(entry, kept)
        elif (not entry.name.startswith(".") or entry.name == MARK) and not same_file(entry, kept):
            yield entry
