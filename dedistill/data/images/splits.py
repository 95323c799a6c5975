"""Splits of a set as the Hugging Face hub divides sets: by names of folders (``test/``) and of files that hold many images
(``data/train-00000-of-00002.parquet``)."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from dedistill.data.images.rows import is_table
from dedistill.data.images.types import ImageSet
from dedistill.errors import UserError

DEEPEST = 100
"""Folders within folders that are looked into."""
TRAIN, ALL = "train", "all"
KEY = "data.sets.split (--split of dedistill scan)"
_CALLED = {
    TRAIN: "train training",
    "validation": "validation valid val dev",
    "test": "test testing eval evaluation",
}
_WORDS = {word: split for split, words in _CALLED.items() for word in words.split()}
_SHARD = re.compile(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}(?!\d).*")
"""As the hub writes its own tables, whatever the split is called."""


def split_named(name: str) -> str:
    """The split that a user means: val is validation. Others than the usual ones keep their name."""
    return _WORDS.get(name.lower(), name)


def split_of(file: str) -> str:
    """The split that the name of a file tells: a word of it, bounded by anything but letters; empty where it tells none."""
    if is_table(file) and (shard := _SHARD.fullmatch(file)):
        return split_named(shard[1])
    return next((_WORDS[word] for word in re.split(r"[^a-z]+", file.lower()) if word in _WORDS), "")


def other_splits(source: ImageSet) -> dict[str, str]:
    """Files and folders below the folder of ``source`` that are of another split than it takes, and the reason.

    That is the split it names, else train where there are several. Raises UserError where there is no such split.
    """
    where = f"data: source '{source.title}'"
    found = dict(_divided(source.root, "", set())) if source.split != ALL else {}
    names = sorted({*found.values()})
    there = f"'{source.path}' has " + (f"the splits {', '.join(names)}" if names else "no splits, by names of files or folders")
    wanted = split_named(source.split or TRAIN)
    if (source.split or len(names) > 1) and source.split != ALL and wanted not in names:
        raise UserError(f"{where}: {there} and none '{wanted}': choose one with {KEY}, or '{ALL}'", 2)
    reason = f"of split '{{}}', and '{wanted}' is taken; {KEY} takes another, or '{ALL}'"
    return {name: reason.format(split) for name, split in found.items() if split != wanted and len(names) > 1}


def _divided(root: Path, folder: str, seen: set[tuple[int, int]]) -> Iterator[tuple[str, str]]:
    """(name below root, split) of what tells one; below a folder that does nothing is looked at."""
    if folder.count("/") > DEEPEST:
        return
    status = os.stat(root / folder)
    if (identity := (status.st_dev, status.st_ino)) in seen:
        return
    seen.add(identity)
    below = []
    with os.scandir(root / folder) as entries:
        for entry in entries:
            name = f"{folder}{entry.name}"
            if entry.name.startswith("."):
                continue
            if is_table(entry.name) or (entry.name.lower().endswith(".tar") and not folder):
                if split := split_of(entry.name):
                    yield name, split
            elif is_folder(entry):
                if split := _WORDS.get(entry.name.lower(), ""):
                    yield name, split
                else:
                    below.append(name)
    for name in below:
        yield from _divided(root, f"{name}/", seen)


def is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
