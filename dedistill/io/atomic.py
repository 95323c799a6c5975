"""Files that are whole or not there, and say so when the disk refuses."""

import fcntl
import hashlib
import itertools
import json
import os
import re
import resource
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from dedistill.errors import UserError

UNFINISHED = ".tmp-dedistill"
"""Behind the name of what is being written. Whoever writes there holds a lock on it: without one it is a killed writer's."""
TEMPORARY = re.compile(rf"{re.escape(UNFINISHED)}(-\d+)?(-old)?$")
"""How the names of files and folders end that are being written, or were put aside for a moment."""
_STEP = re.compile(r"step-(\d+)(\.safetensors)?")


def step_name(step: int) -> str:
    """How checkpoints and snapshots of ``step`` are called, without an ending."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """The step of a checkpoint folder or a snapshot file, read from its name; None for anything else."""
    match = _STEP.fullmatch(path.name)
    return int(match[1]) if match else None


def with_home(path: str) -> str:
    """``path`` with a leading ``~`` or ``~user`` written out. Raises ValueError when there is no such home."""
    whole = os.path.expanduser(path)
    if whole.startswith("~"):
        raise ValueError("must begin with a home folder that is known here, or with ./~ for a folder of that name")
    return whole


def refused(path: Path, error: OSError, size: int | None = None) -> UserError:
    """The one wording of a write that failed."""
    amount = f" ({size:,} bytes)" if size is not None else ""
    return UserError(f"cannot write '{path}'{amount}: {error.strerror or error}. What was saved before is intact.")


def write_synced(path: Path, data: bytes) -> str:
    """Write and fsync a file; returns its SHA-256. Raises UserError naming path and bytes when the disk refuses."""
    try:
        with open(path, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
    except OSError as e:
        raise refused(path, e, len(data)) from e
    return hashlib.sha256(data).hexdigest()


def sync(path: Path) -> None:
    """fsync a file, or the names in a directory. Raises UserError naming it when the disk refuses."""
    try:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as e:
        raise refused(path, e) from e


def make_folder(path: Path) -> None:
    """Make ``path`` and what is missing above it, so that they and what is synced inside survive a loss of power."""
    missing = [p for p in (path, *path.parents) if not p.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync(folder.parent)


USUAL_FILES = 512
"""Files that a process has open for other reasons, at most."""


def allow_open_files(count: int) -> None:
    """Let this process have ``count`` more files open than the usual few. Raises UserError where the system forbids it."""
    soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + USUAL_FILES
    if resource.RLIM_INFINITY in (soft, most) or needed <= soft:
        return
    if needed > most:
        raise UserError(
            f"{needed:,} files have to be open at once, and {most:,} may be: ulimit -Hn {needed}, or ask who runs it"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, most))


def _sibling(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}{UNFINISHED}{f'-{number}' if number else ''}")


def _lock(place: Path, fd: int, *, fresh: bool) -> bool:
    """Lock what ``fd`` has open at ``place``; False where somebody else writes there, or may do so for all we can tell."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return fresh
    return _is_at(place, fd)  # whoever wrote there may have published it meanwhile


def _is_at(place: Path, fd: int) -> bool:
    try:
        return os.path.samestat(os.lstat(place), os.fstat(fd))
    except OSError:
        return False


class WholeFile:
    """A file written piece by piece that appears at ``path`` complete or not at all. Use as a context manager.

    A sibling that is locked while it is written, fsync, rename, fsync of the folder. What a killed process left of the
    sibling is written over. ``write`` raises UserError naming the path when the disk refuses; nothing is left behind then.
    """

    def __init__(self, path: Path):
        self.path = path
        self._size = 0

    def __enter__(self) -> "WholeFile":
        try:
            self._temporary, self._file = next(filter(None, map(self._opened, itertools.count())))
        except OSError as e:
            raise refused(self.path, e) from e
        return self

    def _opened(self, number: int) -> tuple[Path, BinaryIO] | None:
        """An empty sibling that nobody else writes to; None where that of ``number`` is another's."""
        place, fresh = _sibling(self.path, number), True
        try:
            file: BinaryIO = open(place, "xb")  # noqa: SIM115 - closed in __exit__
        except FileExistsError:
            fresh = False
            try:
                file = open(place, "r+b")  # noqa: SIM115
            except OSError:
                return None
        if not _lock(place, file.fileno(), fresh=fresh):
            file.close()
            return None
        file.truncate()
        return place, file

    def write(self, data: bytes | memoryview) -> int:
        self._size += len(data)
        try:
            return self._file.write(data)
        except OSError as e:
            raise refused(self.path, e, self._size) from e

    def overwrite(self, at: int, data: bytes) -> None:
        """Put ``data`` in the place of what was written from byte ``at`` on; the next ``write`` goes to the end again."""
        try:
            self._file.seek(at)
            self._file.write(data)
            self._file.seek(0, os.SEEK_END)
        except OSError as e:
            raise refused(self.path, e, self._size) from e

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._publish()
        finally:
            if _is_at(self._temporary, self._file.fileno()):  # not published
                self._temporary.unlink()
            with suppress(OSError):  # a full disk refuses the buffered rest once more; the file is thrown away
                self._file.close()

    def _publish(self) -> None:
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            os.replace(self._temporary, self.path)
        except OSError as e:
            raise refused(self.path, e, self._size) from e
        sync(self.path.parent)


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Yields an empty sibling of ``path``, locked while the block runs and removed after it, unless it was renamed.

    What a killed process left of the sibling is removed first.
    """
    make_folder(path.parent)
    place, lock = next(filter(None, (_locked_folder(_sibling(path, n)) for n in itertools.count())))
    try:
        for left in place.iterdir():
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        yield place
    finally:
        if _is_at(place, lock):
            shutil.rmtree(place, ignore_errors=True)
        os.close(lock)


def _locked_folder(place: Path) -> tuple[Path, int] | None:
    """``place`` and the descriptor that locks it; None where it is another's."""
    try:
        place.mkdir()
        fresh = True
    except FileExistsError:
        fresh = False
    try:
        fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        if fresh:
            raise
        return None
    if _lock(place, fd, fresh=fresh):
        return place, fd
    os.close(fd)
    return None


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary sibling to fill, which then takes the place of ``path``; when the block fails nothing changes.

    Killed between the two renames it leaves neither, but both whole; the next one for ``path`` puts the old one back first.
    """
    with temporary_folder(path) as temporary:
        aside = Path(f"{temporary}-old")
        if aside.exists() and not path.exists():
            os.rename(aside, path)
        shutil.rmtree(aside, ignore_errors=True)
        try:
            yield temporary
            for file in [*temporary.rglob("*"), temporary]:
                sync(file)
            if path.exists():
                os.rename(path, aside)
            os.rename(temporary, path)
            sync(path.parent)
        except BaseException:
            if aside.exists() and not path.exists():
                os.rename(aside, path)
            raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def replace_file(path: Path, data: bytes) -> None:
    """Put ``data`` at ``path`` whole or not at all."""
    with WholeFile(path) as file:
        file.write(data)


def as_json(value: object) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def replace_json(path: Path, value: object) -> None:
    """Put ``value`` at ``path`` as indented JSON, whole or not at all."""
    replace_file(path, as_json(value))


def checksummed(table: Mapping[str, object]) -> bytes:
    """``table`` as JSON with a hash of itself, in one canonical form, so that no bit of it can change unnoticed."""
    checksum = hashlib.sha256(json.dumps(dict(table)).encode()).hexdigest()
    return (json.dumps({**table, "seal": checksum}, indent=1) + "\n").encode()


def read_checksummed(path: Path) -> dict[str, Any]:
    """What was given to :func:`checksummed`. Raises ValueError, not naming the file, when a byte has changed since."""
    raw = path.read_bytes()
    try:
        table = json.loads(raw)
        table.pop("seal")
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError) as e:
        raise ValueError(f"is unreadable ({type(e).__name__})") from e
    if raw != checksummed(table):
        raise ValueError("differs from what was written")
    return table
