"""What is in a data set: counts, sizes, buckets, caption lengths, what cannot be used, and what comes twice."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dedistill.data.images.buckets import buckets_for, crops_of
from dedistill.data.images.duplicates import near_duplicates
from dedistill.data.images.index import Index, Sample
from dedistill.data.images.likeness import Likeness
from dedistill.errors import UserError, amount

SIDES = (256, 384, 512, 768, 1024, 1536, 2048, 4096)
SHORT_WORDS = 20
"""A caption of at most so many words counts as short."""
LENGTHS = (8, 16, 32, 64, 128, 256, 512)


def scan(
    index: Index,
    *,
    resolutions: Sequence[int],
    tokenizer: Path | None = None,
    max_upscale: float = 1.0,
) -> dict[str, Any]:
    """Facts about ``index`` as JSON-able values.

    ``tokenizer``: folder of a tokenizer to measure captions with (its end mark counted); without one, words are counted.
    """
    samples = index.samples
    lengths, unit = _lengths([caption for s in samples for caption in s.captions], tokenizer)
    near = near_duplicates([Likeness.unpacked(s.likeness) for s in samples])
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
        "recipe": [],
        "names": {i: samples[i].name for group in near for i in group},
    }


def scan_lines(facts: dict[str, Any]) -> list[str]:
    """The facts as lines for a terminal."""
    lines = list(facts["recipe"])
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
    lines += [f"left out: {name}: {reason}" for name, reason in facts["quarantined"][:20]]
    if len(facts["quarantined"]) > 20:
        lines.append(f"... and {len(facts['quarantined']) - 20:,} more")
    groups = facts["near_duplicates"]
    lines.append(f"near-duplicates: {amount(len(groups), 'group')}, {amount(sum(map(len, groups)), 'image')}")
    lines += ["  " + " = ".join(facts["names"][i] for i in group[:4]) for group in groups[:10]]
    return lines


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


class Captioned(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def captions(self) -> tuple[str, ...]: ...


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
