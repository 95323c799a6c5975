"""Candidates x CFG x first-k-without-CFG x prompts x seeds: pictures, numbers, and what each cell scored.

The folder holds ``index.json`` (a row per picture), ``scores.json`` (a row per cell) and the pictures as PNG at their
own resolution. Cells whose pictures and rows are there already are not made again.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dedistill.assemble import Model
from dedistill.errors import UserError
from dedistill.files import replace_json
from dedistill.flow.solvers import sigma_grid
from dedistill.sampling.artefacts import diversity
from dedistill.sampling.grid import as_image
from dedistill.sampling.judge import DigitJudge
from dedistill.sampling.judges import ClipJudge
from dedistill.sampling.sampler import sample, start_noise
from dedistill.sampling.scores import picture_numbers

NUMBERS = [
    {
        "key": "accuracy",
        "label": "accuracy",
        "better": "high",
        "help": "Share of digits that an independent classifier reads as asked.",
    },
    {
        "key": "frechet",
        "label": "Frechet distance",
        "better": "low",
        "help": "Distance of the pictures to real ones, in 20 components.",
    },
    {"key": "precision", "label": "precision", "better": "high", "help": "Share of pictures that lie among real ones."},
    {"key": "recall", "label": "recall", "better": "high", "help": "Share of real pictures that lie among those made."},
    {
        "key": "clip",
        "label": "CLIP score",
        "better": "high",
        "help": "How well CLIP finds that pictures fit their prompts, of 100.",
    },
    {
        "key": "clip_frechet",
        "label": "CLIP Frechet distance",
        "better": "low",
        "help": "Distance of the pictures to real ones in CLIP's eyes; few pictures raise it.",
    },
    {"key": "saturated", "label": "saturated", "better": "low", "help": "Share of pixels burnt beyond the range of the data."},
    {"key": "contrast", "label": "contrast", "better": None, "help": "Standard deviation of the pixels."},
    {
        "key": "detail",
        "label": "detail",
        "better": None,
        "help": "Share of energy in high frequencies: blur lowers, noise raises it.",
    },
    {"key": "blur", "label": "blur", "better": "low", "help": "Share of steps between pixels that blurring again leaves."},
    {"key": "shadow", "label": "shadow", "better": "low", "help": "Share of light missing in large soft dark places."},
    {
        "key": "clipped",
        "label": "clipped",
        "better": "low",
        "help": "Share of areas at an end of the range, without any drawing.",
    },
    {"key": "colour", "label": "colour", "better": None, "help": "Colourfulness: strong guidance raises it. 0 is grey."},
    {
        "key": "diversity",
        "label": "diversity",
        "better": "high",
        "help": "How far the seeds of one prompt differ: 1 is unrelated, 0 is copies.",
    },
]


@dataclass(frozen=True)
class Candidate:
    """Something to sample from. ``weights`` identifies its bytes; ``open`` loads it when its cells are not there yet."""

    name: str
    weights: str
    steps: int
    open: Callable[[], Model]


@dataclass(frozen=True)
class Grid:
    cfgs: tuple[float, ...]
    skips: tuple[int, ...]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]

    def cells(self) -> Iterable[tuple[float, int]]:
        """(cfg, skip); skipping the guidance of CFG 1 changes nothing, so it has one cell."""
        return [(c, s) for s in self.skips for c in self.cfgs if not (c == 1 and s != self.skips[0])]


def sweep(
    candidates: list[Candidate],
    grid: Grid,
    out: Path,
    *,
    title: str,
    judge: DigitJudge | None,
    clip: ClipJudge | None = None,
    say: Callable[[str], None] = print,
) -> dict:
    """Make what is missing, write both JSON files, return the scores."""
    if len({c.name for c in candidates}) != len(candidates):
        raise UserError(f"two candidates share a name: {', '.join(c.name for c in candidates)}", exit_code=2)
    out.mkdir(parents=True, exist_ok=True)
    rows, cells = [], []
    for candidate in candidates:
        model = None
        for cfg, skip in grid.cells():
            folder = out / "pictures" / candidate.name / f"cfg{cfg:g}_skip{skip}"
            key = _cell_key(candidate, grid, cfg, skip) | {
                "judge": judge.identity if judge else None,
                "clip": clip.identity if clip else None,
                "numbers": [n["key"] for n in NUMBERS],
            }
            if (known := _reusable(folder, key, out)) is None:
                if model is None:
                    model = candidate.open()
                    model.remember([*grid.prompts, model.negative])
                known = _make_cell(model, candidate, grid, cfg, skip, folder, out, judge, clip)
                replace_json(folder / "cell.json", {"key": key, **known})
                say(f"{candidate.name} cfg {cfg:g} skip {skip}: " + _short(known["cell"]))
            rows += known["rows"]
            cells.append(known["cell"])
    scores = {
        "title": title,
        "settings": {
            "prompts": len(grid.prompts),
            "seeds": ", ".join(map(str, grid.seeds)),
            "solver": "Euler",
            **({"judge reads real held-out digits": f"{judge.held_out_accuracy:.1%}"} if judge else {}),
        },
        "numbers": [n for n in NUMBERS if any(n["key"] in c for c in cells)],
        "cells": cells,
    }
    replace_json(out / "index.json", rows)
    replace_json(out / "scores.json", scores)
    return scores


def _cell_key(candidate: Candidate, grid: Grid, cfg: float, skip: int) -> dict:
    return {
        "weights": candidate.weights,
        "steps": candidate.steps,
        "cfg": cfg,
        "skip": skip,
        "prompts": list(grid.prompts),
        "seeds": list(grid.seeds),
    }


def _reusable(folder: Path, key: dict, out: Path) -> dict | None:
    """Rows and scores of a cell made earlier from the same weights and settings, if all its pictures are there."""
    try:
        known = json.loads((folder / "cell.json").read_text())
    except (OSError, ValueError):
        return None
    if known.get("key") != key or not all((out / row["file"]).exists() for row in known["rows"]):
        return None
    return known


def _make_cell(
    model: Model,
    candidate: Candidate,
    grid: Grid,
    cfg: float,
    skip: int,
    folder: Path,
    out: Path,
    judge: DigitJudge | None,
    clip: ClipJudge | None,
) -> dict:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cell.json").unlink(missing_ok=True)  # its pictures are about to be overwritten
    place = {"candidate": candidate.name, "cfg": cfg, "skip": skip, "steps": candidate.steps}
    everything, vectors, rows = [], [], []
    for seed in grid.seeds:
        noise = start_noise(seed, len(grid.prompts), model.parts.picture)
        pictures = sample(model, list(grid.prompts), noise, sigma_grid(candidate.steps, model.grid_shift), cfg=cfg, skip=skip)
        numbers = picture_numbers(pictures)
        if judge:
            numbers["correct"] = judge.correct(pictures, list(grid.prompts))
        if clip:
            vectors.append(clip.embed(pictures))
            numbers["clip"] = clip.scores(vectors[-1], list(grid.prompts))
        for i, prompt in enumerate(grid.prompts):
            file = folder / f"p{i:03d}_s{seed}.png"
            save_png(pictures[i], file)
            row = {"file": file.relative_to(out).as_posix(), **place, "prompt": prompt, "seed": seed}
            rows.append(row | {k: round(float(v[i]), 6) for k, v in numbers.items() if not np.isnan(v[i])})
        everything.append(pictures)
    cell = {**place, "pictures": len(rows)}
    cell |= {k: float(np.mean([r[k] for r in rows])) for k in numbers if k != "correct"}
    if len(grid.seeds) > 1:
        cell["diversity"] = float(diversity(torch.stack(everything)).mean())
    if judge and (correct := [r["correct"] for r in rows if "correct" in r]):  # a prompt without digits has no accuracy
        cell["accuracy"] = float(np.mean(correct))
    if len(rows) > 1:  # one picture has no spread to compare
        cell |= judge.numbers(torch.cat(everything)) if judge else {}
        cell |= {"clip_frechet": clip.distance(np.concatenate(vectors))} if clip and clip.real is not None else {}
    return {"rows": rows, "cell": cell}


def save_png(picture: Tensor, path: Path) -> None:
    """One picture [C, H, W] in [-1, 1] as PNG at its own resolution."""
    as_image(picture).save(path)


def _short(cell: dict) -> str:
    names = ("accuracy", "frechet", "precision", "saturated")
    return "  ".join(f"{n} {cell[n]:.3f}" for n in names if n in cell)
