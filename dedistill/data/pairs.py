"""Stored pairs of noise and image with points of the trajectory between them: reading webdataset shards by offset.

A folder of pairs holds ``pairs.json`` (how they were made, and each shard's SHA-256) and tar shards. A sample is
``<key>.noise.npy``, ``<key>.trajectory.npy`` [K, C, H, W] (the last point is the image) and ``<key>.txt``.
"""

import io
import mmap
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dedistill.data.source import Batch, OneSize
from dedistill.errors import UserError, amount
from dedistill.flow import keyed
from dedistill.flow.keyed import sample_indices
from dedistill.io.atomic import allow_open_files, read_checksummed
from dedistill.io.hashing import file_sha256

FACTS = "pairs.json"
HELD_OUT = 16
"""One pair in this many is kept for validation."""


class PairSource(OneSize):
    """Pairs by index. Shards are checked against their hashes once, then read by offset without extraction."""

    name = "pairs"

    def __init__(self, folder: Path):
        self.folder = folder
        self.facts = read_facts(folder)
        self.sigmas = np.array(self.facts["sigmas"])
        self.image: tuple[int, int, int] = tuple(self.facts["picture"])
        allow_open_files(len(self.facts["shards"]))  # each stays mapped
        self._members = [m for shard in self.facts["shards"] for m in _index_shard(folder, shard)]
        everything = np.arange(len(self._members))
        self.train_ids = everything[everything % HELD_OUT != 0]
        self.held_out_ids = everything[everything % HELD_OUT == 0]
        if len(self.train_ids) == 0:
            raise UserError(f"data.path: '{folder}' holds {amount(len(everything), 'pair')}; at least 2 are needed")

    def draw(self, seed: int, step: int, positions: np.ndarray, batch: int, *, held_out: bool = False) -> Batch:
        picks = self._picks(seed, step, positions, batch, held_out)
        noise, trajectory, captions = zip(*(self._read(i) for i in picks))
        trajectory = torch.from_numpy(np.stack(trajectory))
        names = _names(picks)
        return Batch(trajectory[:, -1], list(captions), names, torch.from_numpy(np.stack(noise)), trajectory, self.sigmas)

    def names(self, seed: int, step: int, positions: np.ndarray, batch: int, *, held_out: bool = False) -> list[str]:
        return _names(self._picks(seed, step, positions, batch, held_out))

    def _picks(self, seed: int, step: int, positions: np.ndarray, batch: int, held_out: bool) -> np.ndarray:
        """The pair at each position."""
        ids = self.held_out_ids if held_out else self.train_ids
        purpose = "held-out" if held_out else "train"
        return ids[sample_indices(seed, f"pairs/{purpose}", step * batch + np.asarray(positions), len(ids))]

    def prompts(self, seed: int, count: int) -> list[str]:
        """Stored captions, drawn with repetition from all pairs: as many as are asked for, prompt i whatever their number."""
        picks = keyed.generator(seed, "pairs/prompts").random(count) * len(self._members)
        return [self._part(int(i), "txt").decode() for i in picks]

    def _read(self, index: int) -> tuple[np.ndarray, np.ndarray, str]:
        try:
            noise, trajectory = (
                np.load(io.BytesIO(self._part(index, ext)), allow_pickle=False).astype(np.float32)
                for ext in ("noise.npy", "trajectory.npy")
            )
            if noise.shape != self.image or trajectory.shape != (len(self.sigmas), *self.image):
                raise ValueError(f"arrays of {noise.shape} and {trajectory.shape}")
            return noise, trajectory, self._part(index, "txt").decode()
        except (ValueError, KeyError, TypeError, EOFError, OSError) as e:
            raise UserError(
                f"data.path: pair {index} of '{self.folder}' cannot be read ({e}); it was not made by dedistill pairs"
            ) from e

    def _part(self, index: int, ext: str) -> bytes:
        shard, member = self._members[index]
        start, size = member[ext]
        return bytes(shard[start : start + size])


def _names(picks: np.ndarray) -> list[str]:
    return [f"pairs/{i}" for i in picks]


def read_facts(folder: Path) -> dict[str, Any]:
    """``pairs.json`` of a finished folder."""
    try:
        facts = read_checksummed(folder / FACTS)
        _check_facts(facts)
    except OSError as e:
        raise UserError(f"data.path: no pairs in '{folder}' (make them with dedistill pairs): {e}") from e
    except ValueError as e:
        raise UserError(f"data.path: '{folder / FACTS}' {e}; delete it and run dedistill pairs again") from e
    if not facts.get("complete"):
        raise UserError(
            f"data.path: '{folder}' is unfinished ({amount(len(facts['shards']), 'shard')}); run dedistill pairs again"
        )
    return facts


def _check_facts(facts: dict[str, Any]) -> None:
    """Raises ValueError, which does not name the file, unless ``facts`` could be ours; shards lie in the folder itself."""
    try:
        plain = all(Path(s["file"]).name == s["file"] and isinstance(s["sha256"], str) for s in facts["shards"])
        numbers = np.array([*facts["sigmas"], *facts["picture"]])
        if not plain or numbers.dtype.kind not in "if" or len(facts["picture"]) != 3 or len(facts["sigmas"]) < 2:
            raise ValueError
    except (KeyError, TypeError, ValueError) as e:
        raise ValueError("is not a list of pairs") from e


def _index_shard(folder: Path, shard: dict[str, Any]) -> list[tuple[mmap.mmap, dict[str, tuple[int, int]]]]:
    """Offset and size of every member of one shard, sample by sample."""
    path = folder / shard["file"]
    try:
        found = file_sha256(path)
    except OSError as e:
        raise UserError(f"data.path: shard '{path}' cannot be read: {e}") from e
    if found != shard["sha256"]:
        raise UserError(f"data.path: shard '{path}' is damaged (its SHA-256 differs); delete it and run dedistill pairs again")
    with open(path, "rb") as f:
        view = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    with tarfile.open(path, mode="r:") as tar:  # plain tar only: no decompression bombs, nothing is extracted
        for member in tar:
            key, _, ext = member.name.partition(".")
            samples.setdefault(key, {})[ext] = (member.offset_data, member.size)
    return [(view, samples[key]) for key in sorted(samples)]
