"""Encoded images and captions on disk: tensors of any length under content keys, in shards that are whole or absent.

A store is a folder of safetensors shards, each named by its own hash, and ``inputs.json``, which says what the
entries depend on beside their key. Nothing is ever changed in place, so a killed preparation goes on where it was.
"""

import fcntl
import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TextIO

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dedistill.distributed.outside import heartbeat
from dedistill.errors import UserError
from dedistill.io.atomic import TEMPORARY, UNFINISHED, make_folder, refused, replace_file, replace_json
from dedistill.io.hashing import file_sha256
from dedistill.io.json_files import read_object
from dedistill.io.safetensors import open_safetensors

OPEN_SHARDS = 256
NAME_LENGTH = 16
AGAIN = "delete this file, it is encoded again (--check-cache looks at all)"

Shapes = dict[str, tuple[int | str, ...]]
"""Part -> the shape of its tensor; a name stands for any length, the same wherever it occurs."""


class Store:
    """Entries {key: {part: tensor}} in ``folder``. Raises UserError when its shards were made from other ``inputs``.

    Any number of processes and threads may read; only a holder of ``sole_writer`` may write.
    """

    def __init__(self, folder: Path, inputs: dict[str, object]):
        self.folder, self.inputs = folder, inputs
        shards = self._shards()
        if shards:
            self._check_inputs()
        self._shard_of = {key: shard for shard in shards for key in _open_shard(shard)[0]}
        self._open = lru_cache(maxsize=OPEN_SHARDS)(_open_whole)

    def _shards(self) -> list[Path]:
        return sorted(self.folder.glob("*.safetensors"))

    def _check_inputs(self) -> None:
        before = read_object(self.folder / "inputs.json", "data.cache", f"delete '{self.folder}' to encode again")
        if differing := [k for k in sorted({*before, *self.inputs}) if before.get(k) != self.inputs.get(k)]:
            listed = "; ".join(f"{k}: {before.get(k)!r} there, {self.inputs.get(k)!r} here" for k in differing)
            raise UserError(
                f"data.cache: '{self.folder}' is stale, it was made with other inputs ({listed}). "
                "Delete it to encode again, or set another data.cache"
            )

    def __contains__(self, key: str) -> bool:
        return key in self._shard_of

    def __len__(self) -> int:
        return len(self._shard_of)

    def write(self, entries: dict[str, dict[str, Tensor]]) -> None:
        """Add one shard of new entries; it appears whole or not at all."""
        if not self._shard_of:
            make_folder(self.folder)
            replace_json(self.folder / "inputs.json", self.inputs)
        flat = {f"{key}.{part}": t.contiguous() for key, parts in entries.items() for part, t in parts.items()}
        data = save(flat, metadata={"format": "pt"})
        shard = self.folder / f"{hashlib.sha256(data).hexdigest()[:NAME_LENGTH]}.safetensors"
        replace_file(shard, data)
        self._shard_of |= dict.fromkeys(entries, shard)

    def read(self, key: str, shapes: Shapes | None = None) -> dict[str, Tensor]:
        """The tensors of one entry by part; ``shapes`` says which they must be. Raises KeyError for a key that is not there.

        Reads these bytes only, and at its first opening in this process the whole shard: one of other bytes than those
        that its name is the hash of is refused by a UserError that names it.
        """
        file = self._shard_of[key]
        names, shard = self._open(file)
        parts = {name.partition(".")[2]: shard.get_tensor(name).clone() for name in names.get(key, ())}
        if shapes is not None and not _fit(parts, shapes):
            held = ", ".join(f"{part} {list(t.shape)}" for part, t in parts.items()) or "nothing"
            wanted = ", ".join(f"{part} [{', '.join(map(str, shape))}]" for part, shape in shapes.items())
            raise UserError(
                f"data.cache: shard '{file}' is not of this cache: '{key}' holds {held}, expected {wanted}; {AGAIN}"
            )
        return parts

    def damaged(self) -> list[Path]:
        """Shards whose bytes are not those that were written. Reads everything."""
        return [shard for shard in self._shards() if file_sha256(shard)[:NAME_LENGTH] != shard.stem]

    def bytes(self) -> int:
        return sum(shard.stat().st_size for shard in self._shards())


def _open_shard(shard: Path) -> tuple[dict[str, list[str]], safe_open]:
    """({key: names of its tensors}, the open file)."""
    names: dict[str, list[str]] = {}
    try:
        opened = open_safetensors(shard)
    except SafetensorError as e:
        raise UserError(f"data.cache: shard '{shard}' is damaged ({e}); {AGAIN}") from e
    except OSError as e:
        raise UserError(f"data.cache: shard '{shard}' cannot be read: {e}") from e
    for name in opened.keys():  # noqa: SIM118
        names.setdefault(name.partition(".")[0], []).append(name)
    return names, opened


def _open_whole(shard: Path) -> tuple[dict[str, list[str]], safe_open]:
    """As ``_open_shard``, of a shard whose bytes were compared with its name."""
    try:
        found = file_sha256(shard)
    except OSError as e:
        raise UserError(f"data.cache: shard '{shard}' cannot be read: {e}; start again to encode what it held") from e
    heartbeat.beat()  # a batch may be the first to open many shards, and training waits for it
    if found[:NAME_LENGTH] != shard.stem:
        raise UserError(f"data.cache: shard '{shard}' is damaged (its SHA-256 is not its name); {AGAIN}")
    return _open_shard(shard)


def _fit(parts: dict[str, Tensor], shapes: Shapes) -> bool:
    if parts.keys() != shapes.keys():
        return False
    lengths: dict[str, int] = {}
    for part, shape in shapes.items():
        if len(shape) != parts[part].ndim:
            return False
        for wanted, found in zip(shape, parts[part].shape):
            if (lengths.setdefault(wanted, found) if isinstance(wanted, str) else wanted) != found:
                return False
    return True


def _locked(lock: TextIO) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def sole_writer(cache: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the stores below ``cache`` for writing; waits while another process does.

    What killed writers left unfinished is removed: nobody else can be writing now.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = open(cache / ".lock", "a")  # noqa: SIM115 - closed below
    except OSError as e:
        raise refused(cache / ".lock", e) from e
    with lock:
        announced = False
        while not _locked(lock):
            if not announced:
                say(f"another process is encoding into '{cache}'; waiting until it is done")
            announced = True
            heartbeat.beat("waiting for another run")
            time.sleep(0.5)
        try:
            for unfinished in cache.glob(f"*/*{UNFINISHED}*"):
                if TEMPORARY.search(unfinished.name):
                    unfinished.unlink()
            yield
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # a process forked meanwhile holds the file open too
