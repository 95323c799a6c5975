"""What is in a data set: counts, sizes, buckets, caption lengths, what cannot be used, and what comes twice."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import imagehash
import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from dedistill.data.images.buckets import buckets_for, crops_of
from dedistill.data.images.index import READERS, Index, Sample
from dedistill.data.order import caption_warnings
from dedistill.errors import UserError, amount

SIDES = (256, 384, 512, 768, 1024, 1536, 2048, 4096)
LENGTHS = (8, 16, 32, 64, 128, 256, 512)
NEAR = 6
"""Of 64 bits of the perceptual hash: copies that were resized or compressed again differ in fewer, strangers in about 32."""
THUMBNAIL = 256


def scan(
    index: Index,
    *,
    resolutions: Sequence[int],
    tokenizer: Path | None = None,
    max_upscale: float = 1.0,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Facts about ``index`` as JSON-able values. Every image is decoded once.

    ``tokenizer``: folder of a tokenizer to measure captions with (its end mark counted); without one, words are counted.
    """
    samples = index.samples
    lengths, unit = _lengths([caption for s in samples for caption in s.captions], tokenizer)
    near = near_duplicates(_hashes(index, say))
    buckets, small = _buckets(samples, resolutions, max_upscale)
    return {
        "sources": _sources(index, lengths),
        "unit": unit,
        "sides": _histogram([(s.width * s.height) ** 0.5 for s in samples], SIDES),
        "lengths": _histogram(lengths, LENGTHS),
        "buckets": buckets,
        "too_small": small,
        "one_sided": [list(pair) for pair in caption_warnings(samples)],
        "quarantined": [list(pair) for pair in index.quarantined],
        "near_duplicates": near,
        "names": {i: samples[i].name for group in near for i in group},
    }


def near_duplicates(hashes: np.ndarray, distance: int = NEAR) -> list[list[int]]:
    """Groups of hashes [N] (uint64) that are linked by steps of at most ``distance`` differing bits.

    Of distance + 1 bands of bits, two such hashes share at least one whole; only those are compared.
    """
    unique, which = np.unique(hashes, return_inverse=True)
    edges = np.linspace(0, 64, distance + 2).round().astype(int)
    pairs = [np.empty((0, 2), dtype=np.int64)]
    for low, high in pairwise(edges):
        band = (unique >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(band, kind="stable")
        for members in np.split(order, np.flatnonzero(np.diff(band[order])) + 1):
            for i in range(len(members) - 1):
                close = np.bitwise_count(unique[members[i]] ^ unique[members[i + 1 :]]) <= distance
                others = members[i + 1 :][close]
                pairs.append(np.stack([np.full_like(others, members[i]), others], axis=1))
    linked = np.concatenate(pairs)
    graph = coo_array((np.ones(len(linked), dtype=np.int8), linked.T), shape=(len(unique), len(unique)))
    groups = defaultdict(list)
    for i, label in enumerate(connected_components(graph, directed=False)[1][which]):
        groups[int(label)].append(i)
    return [group for group in groups.values() if len(group) > 1]


def scan_lines(facts: dict[str, Any]) -> list[str]:
    """The facts as lines for a terminal."""
    lines = []
    for source in facts["sources"]:
        lines.append(
            f"{source['name']}: {amount(source['images'], 'image')}, {amount(source['captions'], 'caption')}"
            f" ({amount(source['several'], 'image has', 'images have')} several), {source['left_out']:,} left out;"
            f" captions of {source['shortest']} to {source['longest']} {facts['unit']}, median {source['median']:g}"
        )
    for title, key in ((f"caption length in {facts['unit']}", "lengths"), ("side of a square of as many pixels", "sides")):
        lines.append(f"{title}: " + ", ".join(f"{label}: {count:,}" for label, count in facts[key] if count))
    for resolution, rows in facts["buckets"].items():
        shapes = ", ".join(f"{width} x {height}: {count:,}" for height, width, count in rows)
        lines.append(
            f"buckets at {resolution} (width x height): {shapes or 'none'}; too small: {facts['too_small'][resolution]:,}"
        )
    if facts["one_sided"]:
        name, what = facts["one_sided"][0]
        images = amount(len(facts["one_sided"]), "image has", "images have")
        lines.append(f"{images} several captions, but only short or only long ones ({name}: {what})")
    lines += [f"left out: {name}: {reason}" for name, reason in facts["quarantined"][:20]]
    if len(facts["quarantined"]) > 20:
        lines.append(f"... and {len(facts['quarantined']) - 20:,} more")
    groups = facts["near_duplicates"]
    lines.append(f"near-duplicates: {amount(len(groups), 'group')}, {amount(sum(map(len, groups)), 'image')}")
    lines += ["  " + " = ".join(facts["names"][i] for i in group[:4]) for group in groups[:10]]
    return lines


def _hashes(index: Index, say: Callable[[str], None]) -> np.ndarray:
    """Perceptual hash of every image as uint64."""

    def one(i: int) -> int:
        image = index.image(i)
        image.thumbnail((THUMBNAIL, THUMBNAIL), reducing_gap=2)
        return int(str(imagehash.phash(image)), 16)

    hashes = []
    with ThreadPoolExecutor(READERS) as pool:
        for i, value in enumerate(pool.map(one, range(len(index.samples))), 1):
            hashes.append(value)
            if i % 5000 == 0:
                say(f"data: compared {i:,} of {amount(len(index.samples), 'image')}")
    return np.array(hashes, dtype=np.uint64)


def _lengths(captions: list[str], tokenizer: Path | None) -> tuple[list[int], str]:
    if tokenizer is None:
        return [len(caption.split()) for caption in captions], "words"
    from transformers import AutoTokenizer

    if not tokenizer.is_dir():
        raise UserError(f"--tokenizer: '{tokenizer}' is not a folder", exit_code=2)
    try:
        from dedistill.models.pretrained import load_tokenizer

        encode = load_tokenizer(AutoTokenizer, tokenizer, "--tokenizer")
    except UserError as e:
        raise UserError(str(e), exit_code=2) from e
    lengths: list[int] = []
    for start in range(0, len(captions), 1000):
        lengths += map(len, encode(captions[start : start + 1000], truncation=False, verbose=False)["input_ids"])
    return lengths, "tokens"


def _sources(index: Index, lengths: list[int]) -> list[dict[str, Any]]:
    owner = np.array([s.source for s in index.samples for _ in s.captions])
    rows = []
    for number, source in enumerate(index.sources):
        mine = [s for s in index.samples if s.source == number]
        its = np.array(lengths)[owner == number]
        rows.append(
            {
                "name": source.title,
                "path": source.path,
                "images": len(mine),
                "left_out": sum(name.startswith(f"{source.title}/") for name, _ in index.quarantined),
                "captions": len(its),
                "several": sum(len(s.captions) > 1 for s in mine),
                "shortest": int(its.min()),
                "median": float(np.median(its)),
                "longest": int(its.max()),
            }
        )
    return rows


def _histogram(values: Sequence[float], edges: Sequence[int]) -> list[tuple[str, int]]:
    """How many values are below the first edge, from one edge to below the next, and from the last edge on."""
    counts = np.bincount(np.searchsorted(edges, values, side="right"), minlength=len(edges) + 1)
    labels = [f"under {edges[0]}", *(f"{a} to {b - 1}" for a, b in pairwise(edges)), f"{edges[-1]} or more"]
    return list(zip(labels, counts.tolist()))


def _buckets(
    samples: Sequence[Sample], resolutions: Sequence[int], max_upscale: float
) -> tuple[dict[int, list[list[int]]], dict[int, int]]:
    """Images per nearest bucket as (height, width, count), and those too small for it, by resolution."""
    filled: dict[int, list[list[int]]] = {}
    small: dict[int, int] = {}
    for resolution in resolutions:
        counts = dict.fromkeys(buckets_for([resolution]), 0)
        small[resolution] = 0
        for sample in samples:
            crops = crops_of(sample, resolutions=[resolution], modes=["center"], per_image=1, seed=0, max_upscale=max_upscale)
            small[resolution] += not crops
            for crop in crops:
                counts[crop.height, crop.width] += 1
        filled[resolution] = [[h, w, count] for (h, w), count in sorted(counts.items()) if count]
    return filled, small
