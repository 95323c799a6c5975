"""Randomness as a function of its place: nothing to save, nothing to restore, the same on any number of devices.

First draws by name, then which sample of which source stands at a place of a run.

A draw is named by (seed, purpose, place...), e.g. (0, "noise", step, position). The name is hashed into the 128-bit
key of a Philox counter generator (Salmon et al. 2011), so two names never share a stream in practice. torch's own CPU
generator keeps only 32 bits of a seed, too few for the tens of millions of draws of a long run.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


def generator(seed: int, purpose: str, *place: int) -> np.random.Generator:
    """A fresh generator that depends on its name alone."""
    name = "/".join([str(seed), purpose, *map(str, place)])
    key = np.frombuffer(hashlib.blake2b(name.encode(), digest_size=16).digest(), dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


def noise(seed: int, purpose: str, step: int, positions: Iterable[int], shape: tuple[int, ...]) -> "Tensor":
    """Standard normal noise [len(positions), *shape], float32, one keyed draw per sample."""
    rows = [generator(seed, purpose, step, int(p)).standard_normal(shape, dtype=np.float32) for p in positions]
    import torch  # here: who only looks at images draws crops, and needs no torch

    return torch.from_numpy(np.stack(rows))


def uniforms(seed: int, purpose: str, step: int, shape: int | tuple[int, ...]) -> np.ndarray:
    """Uniform draws of a whole step, float64, strictly inside (0, 1). Slice it by position."""
    # random() may return exactly 0, where some inverse CDFs are infinite
    return generator(seed, purpose, step).random(shape).clip(2.0**-54, 1 - 2.0**-53)


# --- which sample stands at which place ------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def _epoch(seed: int, purpose: str, epoch: int, count: int) -> np.ndarray:
    return generator(seed, purpose, epoch).permutation(count)


def sample_indices(seed: int, purpose: str, places: np.ndarray, count: int) -> np.ndarray:
    """Dataset index in 0 ... count-1 for each place of the run, a fresh keyed permutation per epoch.

    places: int array, place = step * batch + position. Every sample comes once in ``count`` consecutive places.
    """
    epochs, rows = np.divmod(np.asarray(places, dtype=np.int64), count)
    found, which = np.unique(epochs, return_inverse=True)
    return np.stack([_epoch(seed, purpose, int(epoch), count) for epoch in found])[which, rows]


# --- who is drawn at a place of the run ------------------------------------------------------------------------------


BLOCK = 64
"""Places that share one stratified draw: a whole block holds each source within one of its exact share."""
CHUNK = 4096
"""Places whose uniform draws come from one generator: one generator per place would be a hundred times slower."""
GOLDEN = (math.sqrt(5) - 1) / 2


def draw_samples(
    seed: int, places: np.ndarray, counts: Sequence[int], weights: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """The source, and the index in that source, at each place.

    counts: samples per source; weights: their shares, of any sum. After n places each source was drawn n times its
    share, up to a few draws, and the order inside a block of 64 places is random. Each source walks its own epochs:
    every sample of it once, in a keyed order, before any comes again. Raises ValueError for an empty source or a weight
    that is not positive.
    """
    if len(counts) != len(weights) or not counts:
        raise ValueError(f"{len(weights)} weights for {len(counts)} sources")
    for i, (count, weight) in enumerate(zip(counts, weights)):
        if not (weight > 0 and math.isfinite(weight)):
            raise ValueError(f"source {i} has weight {weight:g}; weights are above 0")
        if count < 1:
            raise ValueError(f"source {i} has no sample")
    places = np.asarray(places, dtype=np.int64)
    sources, earlier = divide(seed, "mix", places, weights)
    indices = np.empty_like(places)
    for i, count in enumerate(counts):
        here = sources == i
        if here.any():
            indices[here] = sample_indices(seed, f"source{i}", earlier[here], count)
    return sources, indices


def choose(seed: int, purpose: str, places: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """A uniform draw from 0 ... counts-1 at each place."""
    chunks, rows = np.divmod(np.asarray(places, dtype=np.int64), CHUNK)
    found, which = np.unique(chunks, return_inverse=True)
    uniform = np.stack([_chunk(seed, purpose, int(chunk)) for chunk in found])[which, rows]
    return (uniform * np.asarray(counts)).astype(np.int64)


@lru_cache(maxsize=8)
def _chunk(seed: int, purpose: str, chunk: int) -> np.ndarray:
    return generator(seed, purpose, chunk).random(CHUNK)


@lru_cache(maxsize=4096)
def _shuffle(seed: int, purpose: str, block: int) -> np.ndarray:
    return generator(seed, f"{purpose}-order", block).permutation(BLOCK)


def divide(seed: int, purpose: str, places: np.ndarray, weights: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """The source of each place, by shares of ``weights``, and how many earlier places have the same source.

    Row r of block b lies at (r + offset_b) / BLOCK in 0 ... 1, and belongs to the source between whose edges that falls:
    systematic sampling. Offsets step by the golden ratio, so what one block rounds up the next ones round down.
    """
    blocks, rows = np.divmod(np.asarray(places, dtype=np.int64), BLOCK)
    edges = np.cumsum(weights)[:-1] / np.sum(weights)
    start = generator(seed, f"{purpose}-start").random()
    offsets = (start + GOLDEN * np.arange(blocks.max(initial=0) + 1)) % 1.0
    # rows of a block before each edge: r + offset < BLOCK * edge
    firsts = np.ceil(BLOCK * edges[None] - offsets[:, None]).clip(0, BLOCK).astype(np.int64)
    counts = np.diff(firsts, axis=1, prepend=0, append=BLOCK)
    before = np.cumsum(counts, axis=0) - counts
    found, which = np.unique(blocks, return_inverse=True)
    order = np.stack([_shuffle(seed, purpose, int(block)) for block in found])
    table = (order[:, :, None] >= firsts[found][:, None, :]).sum(axis=2)
    nth = np.empty_like(table)
    for source in range(counts.shape[1]):
        mine = table == source
        nth[mine] = (np.cumsum(mine, axis=1) - 1)[mine]
    sources = table[which, rows]
    return sources, before[blocks, sources] + nth[which, rows]
