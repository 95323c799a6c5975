"""Stored pairs of noise and image with points of the trajectory between them: reading webdataset shards by offset.

A folder of pairs holds ``pairs.json`` (how they were made, and its shards) and tar shards, each of which begins with its own
account of that and with a table of its rows (webdataset's readers skip both). A sample is ``<index>.states.npy``
[K + 1, C, H, W], the noise first and the image last, and ``<index>.txt``.
"""

import io
import json
import mmap
import tarfile
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dedistill.data.source import Batch, Slot
from dedistill.errors import UserError, amount
from dedistill.flow import keyed
from dedistill.flow.keyed import sample_indices
from dedistill.io.atomic import allow_open_files, read_checksummed

FACTS = "pairs.json"
HEADER, ROWS = "__dedistill__/shard.json", "__dedistill__/rows.npy"
"""The first two members of a shard. ROWS [pairs, 4], int64: index of the pair, where its states begin, bytes of its text, and
the CRC-32 of both."""
BLOCK = tarfile.BLOCKSIZE
HELD_OUT = 16
"""One pair in this many is kept for validation."""


class PairSource:
    """Pairs by index. The account of every shard is checked at once, a pair's bytes whenever they are read."""

    name = "pairs"

    def __init__(self, folder: Path, key: str = "data.path"):
        """key: of the recipe, which messages name."""
        self.folder, self.key = folder, key
        self.facts = read_facts(folder, key)
        self.sigmas = np.array(self.facts["sigmas"])
        self.image: tuple[int, int, int] = tuple(self.facts["image"])
        listed = self.facts["shards"]
        allow_open_files(len(listed))  # each stays mapped
        self._shards = [_listed_shard(folder, entry, self.facts, key) for entry in listed]
        self.ends: np.ndarray = np.cumsum([len(shard.rows) for shard in self._shards])
        everything = np.arange(self.ends[-1] if listed else 0)
        held = everything % HELD_OUT == 0
        self.train_ids, self.held_out_ids = everything[~held], everything[held]
        if len(self.train_ids) == 0:
            raise UserError(f"{key}: '{folder}' holds {amount(len(everything), 'pair')}; at least 2 are needed")

    def __len__(self) -> int:
        return len(self.train_ids) + len(self.held_out_ids)

    def left_out(self) -> dict[str, str]:
        """Pairs that were made and are not here, by index, and why."""
        return {i: why for shard in self._shards for i, why in shard.header["quarantined"].items()}

    def rounding(self) -> tuple[float, float]:
        """What storing the states in their dtype changed: rms as a share of theirs, and at most."""
        lost = [shard.header["rounding"] for shard in self._shards]
        return float(np.sqrt(np.mean([x["rms"] ** 2 for x in lost]))), max(x["most"] for x in lost)

    def slots(self, seed: int, step: int, batch: int, *, held_out: bool = False) -> list[Slot]:
        ids, purpose = (self.held_out_ids, "held-out") if held_out else (self.train_ids, "train")
        places = np.arange(step * batch, (step + 1) * batch)
        picks = ids[sample_indices(seed, f"pairs/{purpose}", places, len(ids))].tolist()
        return [Slot(f"pairs/{pick}", (pick,)) for pick in picks]

    def draw(self, slots: Sequence[Slot]) -> Batch:
        states, captions = zip(*(self.read(slot.index[0]) for slot in slots))
        trajectory = torch.from_numpy(np.stack(states))
        return Batch(trajectory[:, -1], list(captions), trajectory[:, 0], trajectory, self.sigmas)

    def prompts(self, seed: int, count: int) -> list[str]:
        """Stored captions, drawn with repetition from all pairs: as many as are asked for, prompt i whatever their number."""
        picks = keyed.generator(seed, "pairs/prompts").random(count) * len(self)
        return [self.read(int(i))[1] for i in picks]

    def read(self, index: int) -> tuple[np.ndarray, str]:
        """The states [K + 1, C, H, W], float32, and the caption of a pair. Raises UserError for one that is damaged."""
        number = int(np.searchsorted(self.ends, index, side="right"))
        shard = self._shards[number]
        try:
            states, caption = shard.read(int(index - self.ends[number]))
        except ValueError as e:
            raise UserError(_damaged(self.key, shard.path, f"pair {index} {e}")) from e
        try:
            found = np.load(io.BytesIO(states), allow_pickle=False).astype(np.float32)
            if found.shape != (len(self.sigmas), *self.image):
                raise ValueError(f"states of {found.shape}")
            return found, caption.decode()
        except (ValueError, TypeError, EOFError, OSError) as e:
            raise UserError(
                f"{self.key}: pair {index} of '{self.folder}' cannot be read ({e}); it was not made by dedistill pairs"
            ) from e


def _damaged(key: str, path: Path, how: str) -> str:
    return f"{key}: shard '{path}' is damaged ({how}); run dedistill pairs again, which makes it anew"


# --- how pairs were made ---------------------------------------------------------------------------------------------


def read_facts(folder: Path, key: str) -> dict[str, Any]:
    """``pairs.json`` of a finished folder."""
    try:
        facts = read_checksummed(folder / FACTS)
        _check_facts(facts)
    except OSError as e:
        raise UserError(f"{key}: no pairs in '{folder}' (make them with dedistill pairs): {e}") from e
    except ValueError as e:
        raise UserError(f"{key}: '{folder / FACTS}' {e}; delete it and run dedistill pairs again") from e
    if not facts.get("complete"):
        there = sum(1 for _ in folder.glob("*.tar"))
        raise UserError(f"{key}: '{folder}' is unfinished ({amount(there, 'shard')}); run dedistill pairs again")
    return facts


def _check_facts(facts: dict[str, Any]) -> None:
    """Raises ValueError, which does not name the file, unless ``facts`` could be ours; shards lie in the folder itself."""
    try:
        plain = all(Path(s["file"]).name == s["file"] and isinstance(s["sha256"], str) for s in facts["shards"])
        numbers = np.array([*facts["sigmas"], *facts["image"]])
        if not plain or numbers.dtype.kind not in "if" or len(facts["image"]) != 3 or len(facts["sigmas"]) < 2:
            raise ValueError
    except (KeyError, TypeError, ValueError) as e:
        raise ValueError("is not a list of pairs") from e


def differing(found: dict[str, Any], facts: dict[str, Any]) -> str:
    """What of ``facts`` is otherwise in ``found``, for a message; empty where nothing is."""
    return "; ".join(f"{k}: {found.get(k)!r} there, {facts[k]!r} here" for k in facts if found.get(k) != facts[k])


# --- one shard -------------------------------------------------------------------------------------------------------


def padded(size: int) -> int:
    """Bytes of a member of a tar file, with its own header."""
    return BLOCK + size + -size % BLOCK


def archive(members: int) -> int:
    """Bytes of a tar file of so many bytes of members: it ends in two empty blocks, and in a whole record."""
    end = members + 2 * BLOCK
    return end + -end % tarfile.RECORDSIZE


@dataclass(frozen=True)
class Shard:
    """header: ``facts``, how it was made, and what came of it. rows: ROWS. sha256: of both, and so of every pair.

    All but the header stays in the file, which is mapped.
    """

    path: Path
    header: dict[str, Any]
    rows: np.ndarray
    sha256: str
    state_bytes: int
    view: mmap.mmap

    def read(self, row: int) -> tuple[bytes, bytes]:
        """The states' file and the text of a pair. Raises ValueError where they differ from what was written."""
        _, start, text_bytes, checksum = (int(n) for n in self.rows[row])
        end = start + self.state_bytes
        text = end + -self.state_bytes % BLOCK + BLOCK
        states, caption = self.view[start:end], self.view[text : text + text_bytes]
        if zlib.crc32(caption, zlib.crc32(states)) != checksum:
            raise ValueError("differs from what was written")
        return states, caption

    def is_whole(self) -> bool:
        """Reads every pair."""
        with suppress(ValueError):
            return all(self.read(row) for row in range(len(self.rows)))
        return False


def open_shard(path: Path) -> Shard:
    """Raises OSError, and ValueError, which does not name the file, for one that is cut or of another kind."""
    with open(path, "rb") as f:
        view = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            with tarfile.open(fileobj=f, mode="r:") as tar:  # plain tar only: no decompression bombs, nothing is extracted
                header, rows = tar.next(), tar.next()
        except tarfile.TarError as e:
            raise ValueError(str(e)) from e
    if header is None or rows is None or (header.name, rows.name) != (HEADER, ROWS):
        raise ValueError("it has no table of pairs")
    end = rows.offset_data + rows.size
    try:
        about = json.loads(view[header.offset_data : header.offset_data + header.size])
        count, state_bytes = int(about["pairs"]), int(about["state_bytes"])
        dict(about["facts"]), dict(about["quarantined"]), dict(about["rounding"])  # are tables
        table = np.frombuffer(view, np.int64, count * 4, end - count * 32).reshape(count, 4)
    except (ValueError, RecursionError, KeyError, TypeError) as e:
        raise ValueError(f"its header is unreadable: {type(e).__name__}") from e
    members = rows.offset_data + padded(rows.size)
    if count:
        members = int(table[-1, 1]) + padded(state_bytes) + padded(int(table[-1, 2]))
    if len(view) != (size := archive(members - BLOCK)):
        raise ValueError(f"it has {len(view):,} bytes instead of {size:,}")
    return Shard(path, about, table, sha256(view[header.offset_data : end]).hexdigest(), state_bytes, view)


def _listed_shard(folder: Path, entry: dict[str, Any], facts: dict[str, Any], key: str) -> Shard:
    path = folder / entry["file"]
    try:
        shard = open_shard(path)
    except OSError as e:
        raise UserError(f"{key}: shard '{path}' cannot be read: {e}") from e
    except ValueError as e:
        raise UserError(_damaged(key, path, str(e))) from e
    if other := differing({k: facts.get(k) for k in shard.header["facts"]}, shard.header["facts"]):
        raise UserError(f"{key}: shard '{path}' was made differently from '{folder / FACTS}' ({other})")
    if shard.sha256 != entry["sha256"]:
        raise UserError(_damaged(key, path, "its table of pairs differs"))
    return shard
