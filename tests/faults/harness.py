"""Faults on purpose: death, refusal and power loss at every operation that changes a folder.

Nothing of the package knows of this. Python's audit events announce each operation before it happens; ``os.fsync`` alone
has none and is wrapped. Operations: opening a file for writing, rename, remove, mkdir, rmdir, fsync.
"""

import builtins
import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import combinations, product
from pathlib import Path
from typing import NamedTuple

_CHANGING = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}
_listeners: list[Callable[[str], None]] = []
_installed = False


def _audit(event: str, arguments: tuple) -> None:
    if not _listeners:
        return
    if event in _CHANGING or (event == "open" and _writes(*arguments[1:])):
        _tell(f"{event} {arguments[0]}")


def _writes(mode: str | None, flags: int) -> bool:
    return any(c in mode for c in "wax+") if mode else bool(flags & (os.O_WRONLY | os.O_RDWR))


def _tell(what: str) -> None:
    for listener in list(_listeners):
        listener(what)


@contextmanager
def operations(listener: Callable[[str], None]) -> Iterator[None]:
    """Within the block ``listener`` is told of every operation just before it; what it raises, the operation raises."""
    global _installed
    if not _installed:
        sys.addaudithook(_audit)
        _installed = True
    real = os.fsync

    def fsync(fd: int) -> None:
        path = os.readlink(f"/proc/self/fd/{fd}")
        _tell(f"fsync {path}")
        real(fd)
        _tell(f"synced {path}")

    os.fsync = fsync
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
        os.fsync = real


def count_operations(action: Callable[[], object]) -> list[str]:
    """The operations of ``action``, in their order."""
    seen: list[str] = []
    with operations(lambda what: seen.append(what) if not what.startswith("synced") else None):
        action()
    return seen


def forked(action: Callable[[], object]) -> int:
    """Run ``action`` in a child process; its wait status. The child never returns into the test."""
    if child := os.fork():
        return os.waitpid(child, 0)[1]
    status = 1
    try:
        action()
        status = 0
    finally:
        os._exit(status)


def killed_before(point: int, action: Callable[[], object]) -> bool:
    """Run ``action`` in a child that SIGKILLs itself before operation ``point`` (from 1); False when it ended earlier."""
    left = point

    def listener(what: str) -> None:
        nonlocal left
        left -= not what.startswith("synced")
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def run() -> None:
        with operations(listener):
            action()

    status = forked(run)
    assert status == 0 or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL), f"the action failed: {status}"
    return status != 0


@contextmanager
def full_disk_from(point: int) -> Iterator[None]:
    """Opening, mkdir and fsync fail for want of room from operation ``point`` on; removing and renaming still work."""
    left = point

    def listener(what: str) -> None:
        nonlocal left
        left -= not what.startswith("synced")
        kind, _, path = what.partition(" ")
        if left <= 0 and kind in ("open", "os.mkdir", "fsync"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    with operations(listener):
        yield


# --- power loss ------------------------------------------------------------------------------------------------------


class _File(NamedTuple):
    """Identity of a file or folder: an inode, and which use of its number it is."""

    inode: int
    use: int
    folder: bool


Listing = dict[str, _File]


class Recorder:
    """What a disk may hold after power is lost at some operation of the block. Use as a context manager.

    The model: the bytes of a file survive from its last fsync on; until then they may be missing, zeroed, or cut. An
    entry of a folder (made, renamed, removed) survives from the next fsync of that folder on; until then any of them may
    be undone, each for itself. What is there when the block begins has survived.
    """

    def __init__(self, root: Path):
        self.root = root
        self.states: list[tuple[str, dict[str, bytes | None]]] = []
        """(operation, {path: bytes, None for a folder}), each state once."""
        self.done: list[dict[str, bytes | None]] = []
        """States after the block ended: what was promised must be in all of them."""
        self._uses: dict[int, int] = {}
        self._alive: set[_File] = set()
        self._now: dict[_File, bytes | Listing] = {}
        self._safe: dict[_File, bytes] = {}
        self._ops: dict[_File, list[tuple[str | None, str | None, _File]]] = {}
        self._base: dict[_File, Listing] = {}
        self._known: set[int] = set()

    def __enter__(self) -> "Recorder":
        self._top = self._scan()
        for file, content in self._now.items():
            if file.folder:
                self._base[file], self._ops[file] = dict(content), []
            else:
                self._safe[file] = content
        self._hook = operations(self._listen)
        self._hook.__enter__()
        return self

    def __exit__(self, kind, *rest) -> None:
        self._hook.__exit__(kind, *rest)
        if kind is None:
            self._observe()
            self.done = list(self._possible())
            self._keep("the end", self.done)

    def _listen(self, what: str) -> None:
        kind, _, path = what.partition(" ")
        if kind == "synced":
            self._sync(os.stat(path).st_ino if os.path.exists(path) else None)
            return
        self._observe()
        self._keep(what, self._possible())

    def _keep(self, what: str, states) -> None:
        for state in states:
            mark = hash(tuple(sorted((k, v if v is None else bytes(v)) for k, v in state.items())))
            if mark not in self._known:
                self._known.add(mark)
                self.states.append((what, state))

    def _identity(self, path: Path) -> _File:
        inode = path.stat(follow_symlinks=False).st_ino
        return _File(inode, self._uses.setdefault(inode, 0), path.is_dir())

    def _scan(self) -> _File:
        """Read the tree as it is; everything that was seen before keeps its last content."""
        seen: set[_File] = set()

        def visit(path: Path) -> _File:
            me = self._identity(path)
            seen.add(me)
            self._now[me] = {p.name: visit(p) for p in sorted(path.iterdir())} if me.folder else path.read_bytes()
            return me

        top = visit(self.root)
        for gone in self._alive - seen:
            self._uses[gone.inode] = gone.use + 1
        self._alive = seen
        return top

    def _observe(self) -> None:
        before = {f: dict(c) for f, c in self._now.items() if f.folder and f in self._alive}
        self._scan()
        for folder in [f for f in self._alive if f.folder]:
            old, new = before.get(folder, {}), self._now[folder]
            self._base.setdefault(folder, {})
            ops = self._ops.setdefault(folder, [])
            came = {n: f for n, f in new.items() if old.get(n) != f}
            left = {n: f for n, f in old.items() if new.get(n) != f}
            for name, file in came.items():
                source = next((n for n, f in left.items() if f == file), None)
                ops.append((source, name, file))
                left.pop(source, None)
                left.pop(name, None)  # replaced
            ops += [(name, None, file) for name, file in left.items()]

    def _sync(self, inode: int | None) -> None:
        self._observe()
        for file in self._alive:
            if file.inode == inode:
                if file.folder:
                    self._base[file], self._ops[file] = dict(self._now[file]), []
                else:
                    self._safe[file] = self._now[file]

    def _listings(self, folder: _File) -> list[Listing]:
        """What may be in one folder: any selection of the operations since its last sync, in their order."""
        ops = self._ops.get(folder, [])
        assert len(ops) < 9, f"too many unsynced operations in one folder: {ops}"
        found: list[Listing] = []
        for size in range(len(ops) + 1):
            for chosen in combinations(ops, size):
                listing = dict(self._base.get(folder, {}))
                for source, name, file in chosen:
                    if source is not None and listing.get(source) == file:
                        del listing[source]
                    if name is not None:
                        listing[name] = file
                if listing not in found:
                    found.append(listing)
        return found

    def _possible(self) -> Iterator[dict[str, bytes | None]]:
        yield from ({p: c for p, c in tree.items() if p} for tree in self._trees(self._top, ""))

    def _trees(self, file: _File, path: str) -> Iterator[dict[str, bytes | None]]:
        if not file.folder:
            yield from ({path: content} for content in self._contents(file))
            return
        for listing in self._listings(file):
            parts = [list(self._trees(child, f"{path}/{name}".lstrip("/"))) for name, child in listing.items()]
            for choice in product(*parts):
                yield {path: None} | {p: c for part in choice for p, c in part.items()}

    def _contents(self, file: _File) -> list[bytes]:
        now, safe = self._now[file], self._safe.get(file, b"")
        if now == safe:
            return [now]
        kept = safe if now.startswith(safe) else b""  # what is appended leaves alone what was synced before
        new = now[len(kept) :]
        half = len(new) // 2
        lost = (b"", bytes(len(new)), new[:half], new[:half] + bytes(len(new) - half))
        return list(dict.fromkeys([now, safe, *(kept + part for part in lost)]))


def lay_out(state: dict[str, bytes | None], folder: Path) -> Path:
    """Put a state of a disk into ``folder``, which is emptied first."""
    import shutil

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path, content in sorted(state.items()):
        if content is None:
            (folder / path).mkdir(parents=True, exist_ok=True)
        else:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            with builtins.open(folder / path, "wb") as f:
                f.write(content)
    return folder
