"""Candidates x ways of sampling x prompts x seeds: images, numbers, and what each cell scored.

The folder holds ``index.json`` (a row per image), ``scores.json`` (a row per cell) and the images as PNG at their
own resolution. Cells whose images and rows are there already are not made again.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from dedistill.errors import UserError
from dedistill.evaluation.judges import ClipJudge, DigitJudge
from dedistill.evaluation.numbers import NUMBERS, VERSION, diversity, image_numbers
from dedistill.evaluation.prompts import distinct
from dedistill.flow.guidance import Guider, guider_of
from dedistill.flow.solvers import SOLVERS
from dedistill.io.atomic import replace_json
from dedistill.io.images import is_whole_image, replace_image
from dedistill.io.json_files import read_array, read_object
from dedistill.models.model import Model
from dedistill.sampling.images import as_image
from dedistill.sampling.sampler import Sampling, sample, start_noise

# --- candidates x ways of sampling x prompts x seeds -----------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """Something to sample from. ``weights`` identifies its bytes; ``open`` loads it when its cells are not there yet.

    average: it is one of the averages of its run.
    """

    name: str
    weights: str
    steps: int
    open: Callable[[], Model]
    average: bool = False


@dataclass(frozen=True)
class Grid:
    """steps: solver steps of every candidate; none: each its own. trained: those of the prompts that were trained on."""

    guiders: tuple[Guider, ...]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: tuple[int, ...] = ()
    solvers: tuple[str, ...] = ("euler",)
    trained: frozenset[str] = frozenset()

    def columns(self, own: int) -> list[Sampling]:
        """The ways of sampling a candidate of ``own`` steps."""
        steps = self.steps or (own,)
        return [Sampling(solver=s, steps=n, guidance=g) for s in self.solvers for n in steps for g in self.guiders]


def guiders_at(cfgs: Iterable[float], skips: Sequence[int] = (0,), names: Sequence[str] = ("cfg",)) -> tuple[Guider, ...]:
    """Guiders as ``guider_of`` names them, at every scale, with every number of first steps without. What guides nowhere, as
    CFG 1 does however it is called, comes once."""
    found = [guider_of(name, cfg, skip) for name in names for skip in skips for cfg in cfgs]
    unguided = [guider for guider in found if guider.neutral]
    return tuple(guider for guider in found if not guider.neutral or guider is unguided[0])


def sweep(
    candidates: list[Candidate],
    grid: Grid,
    out: Path,
    *,
    title: str,
    judge: DigitJudge | None,
    clip: ClipJudge | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Make what is missing, write both JSON files, return the scores."""
    if len({c.name for c in candidates}) != len(candidates):
        raise UserError(f"two candidates share a name: {', '.join(c.name for c in candidates)}", exit_code=2)
    out.mkdir(parents=True, exist_ok=True)
    rows, cells = [], []
    for candidate in candidates:
        model = None
        for column in grid.columns(candidate.steps):
            folder = out / "images" / candidate.name / _folder_name(candidate, column)
            key = _cell_key(candidate, grid, column)
            key |= {name: who.identity if who else None for name, who in (("judge", judge), ("clip", clip))}
            if (known := _reusable(folder, key, out)) is None:
                if model is None:
                    model = candidate.open()
                    model.remember([*grid.prompts, model.negative])
                known = _make_cell(model, candidate.name, column, grid, folder, out, judge, clip)
                replace_json(folder / "cell.json", {"key": key, **known})
                say(f"{candidate.name}, {column.label}: " + _short(known["cell"]))
            _rename_nfe(known["cell"]).setdefault("nfe", column.nfe())  # the first versions wrote none
            rows += known["rows"]
            cells.append(known["cell"])
    scores = {
        "title": title,
        "settings": {
            "prompts": distinct(grid.prompts, grid.trained),
            "seeds": ", ".join(map(str, grid.seeds)),
            "solver": ", ".join(SOLVERS[solver].name for solver in grid.solvers),
            **({"judge reads real held-out digits": f"{judge.held_out_accuracy:.1%}"} if judge else {}),
        },
        "numbers": [n for n in NUMBERS if any(n["key"] in c for c in cells)],
        "cells": cells,
    }
    replace_json(out / "index.json", rows)
    replace_json(out / "scores.json", scores)
    return scores


def _folder_name(candidate: Candidate, column: Sampling) -> str:
    facts = column.facts
    steps = f"_steps{column.steps}" if column.steps != candidate.steps else ""
    method = "_" + re.sub("[^A-Za-z0-9.-]+", "-", str(facts["method"])) if "method" in facts else ""
    return f"cfg{facts['cfg']:g}_skip{facts['skip']}{steps}{method}"


def _cell_key(candidate: Candidate, grid: Grid, column: Sampling) -> dict[str, Any]:
    return {
        "version": VERSION,
        "numbers": [n["image"] for n in NUMBERS if "image" in n],  # a cell made before there was one lacks it
        "weights": candidate.weights,
        **column.facts,
        "prompts": list(grid.prompts),
        "seeds": list(grid.seeds),
    }


def _rename_nfe(cell: dict[str, Any]) -> dict[str, Any]:
    """The cell with its cost as ``nfe``, which earlier versions wrote as ``passes``."""
    if "passes" in cell:
        cell["nfe"] = cell.pop("passes")
    return cell


def _reusable(folder: Path, key: dict[str, Any], out: Path) -> dict[str, Any] | None:
    """Rows and scores of a cell made earlier from the same weights and settings, if all its images are there and whole."""
    try:
        known = read_object(folder / "cell.json")
        if known["key"] == key:
            _require(folder, "cell", [known["cell"]], CELL_KINDS)
            _require(folder, "image", known["rows"], IMAGE_KINDS)
            if all(is_whole_image(out / row["file"]) for row in known["rows"]):
                return known
    except (UserError, KeyError, TypeError):
        pass  # not there yet, or damaged: made again
    return None


def _make_cell(
    model: Model,
    name: str,
    column: Sampling,
    grid: Grid,
    folder: Path,
    out: Path,
    judge: DigitJudge | None,
    clip: ClipJudge | None,
) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cell.json").unlink(missing_ok=True)  # its images are about to be overwritten
    place = {"candidate": name, **column.facts}
    everything, vectors, rows = [], [], []
    for seed in grid.seeds:
        noise = start_noise(seed, len(grid.prompts), model.components.sample_shape)
        images = sample(model, list(grid.prompts), noise, column)
        numbers = image_numbers(images)
        if judge:
            numbers["correct"] = judge.correct(images, list(grid.prompts))
            numbers["realistic"] = judge.realistic(images)
        if clip:
            vectors.append(clip.embed(images))
            numbers["clip"] = clip.scores(vectors[-1], list(grid.prompts))
        for i, prompt in enumerate(grid.prompts):
            file = folder / f"p{i:03d}_s{seed}.png"
            facts: dict[str, Any] = {**place, "shift": model.grid_shift, "prompt": prompt, "seed": seed}
            save_png(images[i], file, facts)
            row = {"file": file.relative_to(out).as_posix(), **facts}
            rows.append(row | {k: round(float(v[i]), 6) for k, v in numbers.items() if not np.isnan(v[i])})
        everything.append(images)
    cell = {**place, "shift": model.grid_shift, "images": len(rows), "nfe": column.nfe(model.grid_shift)}
    cell |= {k: float(np.mean([r[k] for r in rows])) for k in numbers if k not in ("correct", "realistic")}
    if len(grid.seeds) > 1:
        cell["diversity"] = float(diversity(torch.stack(everything)).mean())
    if judge and (correct := [r["correct"] for r in rows if "correct" in r]):  # a prompt without digits has no accuracy
        cell["accuracy"] = float(np.mean(correct))
    if len(rows) > 1:  # one image has no spread to compare
        cell |= judge.numbers(torch.cat(everything)) if judge else {}
        cell |= {"clip_frechet": clip.distance(np.concatenate(vectors))} if clip and clip.real is not None else {}
    return {"rows": rows, "cell": cell}


def save_png(image: Tensor, path: Path, facts: dict[str, object] | None = None) -> None:
    """One image [C, H, W] in [-1, 1] as PNG at its own resolution.

    facts: how it was made, kept in the file as text chunks.
    """
    text = PngInfo()
    for key, value in (facts or {}).items():
        text.add_text(key, str(value))
    replace_image(path, as_image(image), pnginfo=text)


def _short(cell: dict[str, Any]) -> str:
    names = ("accuracy", "frechet", "precision", "saturated")
    return "  ".join(f"{n} {cell[n]:.3f}" for n in names if n in cell)


# --- the two files of a sweep, read and checked ----------------------------------------------------------------------


Kinds = dict[str, type | tuple[type, ...]]
CELL_KINDS: Kinds = {"candidate": str, "cfg": (int, float), "skip": int}
IMAGE_KINDS: Kinds = {**CELL_KINDS, "file": str, "prompt": str, "seed": int}


def read_scores(path: Path) -> dict[str, Any]:
    scores = read_object(path, otherwise=f"is '{path.parent}' the folder of a finished sweep?")
    for key, kind in {"title": str, "settings": dict, "numbers": list, "cells": list}.items():
        if not isinstance(scores.get(key), kind):
            raise UserError(f"{path}: {key!r} is missing or not a {kind.__name__}")
    _require(path, "numbers", scores["numbers"], {"key": str, "label": str})
    _require(path, "cells", scores["cells"], CELL_KINDS)
    if not scores["cells"]:
        raise UserError(f"{path}: 'cells' is empty: the sweep made no images")
    for cell in scores["cells"]:
        _rename_nfe(cell)
    for number in scores["numbers"]:
        number.setdefault("help", "")
        if "picture" in number:  # as sweeps wrote it before they said image
            number["image"] = number.pop("picture")
        if number.setdefault("better", None) not in ("high", "low", None):
            raise UserError(f"{path}: number {number['key']!r}: 'better' is {number['better']!r}, not high, low or null")
    return scores


def read_index(path: Path) -> list[dict[str, Any]]:
    images = read_array(path, otherwise=f"is '{path.parent}' the folder of a finished sweep?")
    if not images:
        raise UserError(f"{path}: expected a list with one object per image")
    _require(path, "image", images, IMAGE_KINDS)
    for entry in images:
        if Path(entry["file"]).is_absolute() or ".." in Path(entry["file"]).parts:
            raise UserError(f"{path}: {entry['file']!r} lies outside the sweep folder; paths must be relative to it")
    return images


def _require(path: Path, what: str, entries: list[object], kinds: Kinds) -> None:
    """Raise when an entry lacks one of the keys or has another kind of value there; amounts of things may be in all or none."""
    amounts = {key: int for key in ("steps", "images") for entry in entries if isinstance(entry, dict) and key in entry}
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise UserError(f"{path}: {what} {i} is not an object")
        for key, kind in (kinds | amounts).items():
            if not isinstance(entry.get(key), kind) or isinstance(entry[key], bool):
                raise UserError(f"{path}: {what} {i}: {key!r} is missing or has the wrong type ({entry.get(key)!r})")
