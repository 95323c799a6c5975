"""Who is drawn at a place of the run: samples, sources by weight, captions, batches of one shape. All keyed, nothing saved."""

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np

from dedistill.errors import UserError, amount
from dedistill.flow import keyed

# --- which sample stands at which place ------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def _epoch(seed: int, purpose: str, epoch: int, count: int) -> np.ndarray:
    return keyed.generator(seed, purpose, epoch).permutation(count)


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
SHORT_WORDS = 20
"""A caption of at most so many words counts as short."""


class Captioned(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def captions(self) -> tuple[str, ...]: ...


def draw_samples(
    seed: int, places: np.ndarray, counts: Sequence[int], weights: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """The source, and the index in that source, at each place.

    counts: samples per source; weights: their shares, of any sum. After n places each source was drawn n times its
    share, up to a few draws, and the order inside a block of 64 places is random. Each source walks its own epochs:
    every sample of it once, in a keyed order, before any comes again. Raises ``UserError`` for an empty source or a weight
    that is not positive.
    """
    if len(counts) != len(weights) or not counts:
        raise UserError(f"data: {amount(len(weights), 'weight')} for {amount(len(counts), 'source')}", exit_code=2)
    for i, (count, weight) in enumerate(zip(counts, weights)):
        if not (weight > 0 and math.isfinite(weight)):
            raise UserError(f"data: source {i} has weight {weight:g}; weights are above 0 (leave a source out instead)", 2)
        if count < 1:
            raise UserError(f"data: source {i} has no usable sample")
    places = np.asarray(places, dtype=np.int64)
    sources, earlier = _sources(seed, places, np.cumsum(weights)[:-1] / np.sum(weights))
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


def caption_warnings(samples: Iterable[Captioned]) -> list[tuple[str, str]]:
    """Images with several captions among which no short one, or no long one, is: (name, what is missing)."""
    warnings = []
    for sample in samples:
        words = [len(caption.split()) for caption in sample.captions]
        if len(words) >= 2 and min(words) > SHORT_WORDS:
            warnings.append((sample.name, f"no caption of at most {SHORT_WORDS} words"))
        elif len(words) >= 2 and max(words) <= SHORT_WORDS:
            warnings.append((sample.name, f"no caption of more than {SHORT_WORDS} words"))
    return warnings


@lru_cache(maxsize=8)
def _chunk(seed: int, purpose: str, chunk: int) -> np.ndarray:
    return keyed.generator(seed, purpose, chunk).random(CHUNK)


@lru_cache(maxsize=4096)
def _shuffle(seed: int, block: int) -> np.ndarray:
    return keyed.generator(seed, "mix-order", block).permutation(BLOCK)


def _sources(seed: int, places: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The source of each place, and how many earlier places have the same source.

    Row r of block b lies at (r + offset_b) / BLOCK in 0 ... 1, and belongs to the source between whose edges that falls:
    systematic sampling. Offsets step by the golden ratio, so what one block rounds up the next ones round down.
    """
    blocks, rows = np.divmod(places, BLOCK)
    start = keyed.generator(seed, "mix-start").random()
    offsets = (start + GOLDEN * np.arange(blocks.max(initial=0) + 1)) % 1.0
    # rows of a block before each edge: r + offset < BLOCK * edge
    firsts = np.ceil(BLOCK * edges[None] - offsets[:, None]).clip(0, BLOCK).astype(np.int64)
    counts = np.diff(firsts, axis=1, prepend=0, append=BLOCK)
    before = np.cumsum(counts, axis=0) - counts
    found, which = np.unique(blocks, return_inverse=True)
    order = np.stack([_shuffle(seed, int(block)) for block in found])
    table = (order[:, :, None] >= firsts[found][:, None, :]).sum(axis=2)
    nth = np.empty_like(table)
    for source in range(counts.shape[1]):
        mine = table == source
        nth[mine] = (np.cumsum(mine, axis=1) - 1)[mine]
    sources = table[which, rows]
    return sources, before[blocks, sources] + nth[which, rows]
