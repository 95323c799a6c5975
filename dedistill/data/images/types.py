"""A source of images as the user names it, and one image of it as it is listed."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

FILES = (".tar", ".jsonl", ".csv", ".parquet")
"""What a source ends in that is a file: one shard, or a list."""


@dataclass(frozen=True)
class ImageSet:
    """One source as the user names it: a folder of images, a folder of tar shards, a tar file, or a list of images.

    ``fields``: keys or columns that hold captions; empty for the usual names. ``split_lines``: whether each line of a
    .txt or .caption file is a caption (None: as ``caption_files.captions_in`` decides). ``file_column``: the column of
    a list that names the image, relative to the list's folder. ``split``: which one, where the folder is divided into splits
    (``splits``; None: train, "all" takes every one). ``name`` defaults to that of the path, without a file's
    extension.
    """

    path: str
    name: str = ""
    fields: tuple[str, ...] = ()
    split_lines: bool | None = None
    file_column: str = "file_name"
    split: str | None = None
    missing_captions: Literal["error", "quarantine", "empty"] = "error"

    @property
    def title(self) -> str:
        path = Path(os.path.abspath(self.path))
        return self.name or (path.stem if path.suffix.lower() in FILES else path.name)

    @property
    def root(self) -> Path:
        """The folder that places are relative to."""
        return Path(self.path) if os.path.isdir(self.path) else Path(self.path).parent


class Place(NamedTuple):
    """Where bytes lie: file relative to the source's root, with the stamp (``io.hashing``) by which a change is noticed.

    A file or shard that cannot be used at all has ``size`` 0.
    """

    file: str
    offset: int
    size: int
    file_size: int
    mtime_ns: int
    ctime_ns: int = 0
    inode: int = 0
    """These two are 0 in an index of an earlier version: the bytes are read once more, and compared."""


NOWHERE = Place("", 0, 0, 0, 0)


@dataclass(frozen=True)
class Found:
    """One image as its source lists it. ``captions`` is None where they stand in ``sidecars``."""

    name: str
    place: Place = NOWHERE
    sidecars: tuple[tuple[str, Place], ...] = ()  # extension, place
    captions: tuple[str, ...] | None = None
    problem: str = ""
    about: str = ""
    """Of a bad row of a table: the image that it names all the same."""
