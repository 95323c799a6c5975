"""SHA-256 of whole files: each is read once per process, and again only when its bytes may have changed."""

import hashlib
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from dedistill.io.atomic import checksummed, make_folder, read_checksummed, replace_file

SETTLED_NS = 2_000_000_000
"""A file that changed less than this ago could change again within one tick of its file system's clock (FAT's is 2 s), with
all of its stamp the same. Its hash is not remembered."""


class Stamp(NamedTuple):
    """By what a change is noticed without reading: whoever edits a file can put its size and mtime back, but not its ctime.

    A copy of the same bytes has another ctime and inode: two stamps that differ are a reason to read, not a difference.
    """

    bytes: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> "Stamp":
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


class Hashed(NamedTuple):
    """The SHA-256 of a file, and its stamp when it was read."""

    stamp: Stamp
    sha256: str


_known: dict[str, Hashed] = {}
"""What this process has read, by real path."""


def file_sha256(path: Path) -> str:
    """The hash of a file's bytes, read unless this process did so already. Raises OSError."""
    return hash_file(path).sha256


def hash_file(path: Path, earlier: Hashed | None = None) -> Hashed:
    """As ``file_sha256``. earlier: what another process found; it holds if the stamp is still the same."""
    place = os.path.realpath(path)
    now, stamp = time.time_ns(), Stamp.of(os.stat(place))
    for known in (_known.get(place), earlier):
        if known is not None and known.stamp == stamp:
            return known
    sha256 = read_sha256(path)
    age = now - max(stamp.mtime_ns, stamp.ctime_ns)  # below zero where another machine's clock set the times
    if 0 <= age < SETTLED_NS or Stamp.of(os.stat(place)) != stamp:
        return Hashed(stamp._replace(ctime_ns=-1), sha256)  # no file has this stamp: nobody will trust it later
    _known[place] = Hashed(stamp, sha256)
    return _known[place]


def read_sha256(path: Path) -> str:
    """Reads the whole file. Raises OSError."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def fingerprint(files: Iterable[Path], memo: Path) -> str:
    """One SHA-256 over names and bytes of ``files``; ``memo`` is a file that keeps their hashes from process to process."""
    try:
        known = read_checksummed(memo)
    except (OSError, ValueError):
        known = None
    known = known if isinstance(known, dict) else {}
    digest, before = hashlib.sha256(), dict(known)
    for file in sorted(files):
        place = str(file.resolve())
        found = hash_file(file, _read_entry(known.get(place)))
        known[place] = [*found.stamp, found.sha256]
        digest.update(f"{file.parent.name}/{file.name} {found.sha256}\n".encode())
    if known != before:
        make_folder(memo.parent)
        replace_file(memo, checksummed(known))
    return digest.hexdigest()


def _read_entry(entry: object) -> Hashed | None:
    """One of ``fingerprint``'s lines; None where it is of another kind, or of a version that kept less."""
    if not isinstance(entry, list) or len(entry) != len(Stamp._fields) + 1:
        return None
    return Hashed(Stamp(*entry[:-1]), entry[-1])
