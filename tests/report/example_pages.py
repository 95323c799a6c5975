"""One small example of every page, for the tests in a browser. A new page is one more function in ``PAGES``."""

import json
from pathlib import Path

import numpy as np
import torch
from closed_form_models import ClosedFormData, closed_form
from PIL import Image
from samplings import at
from test_distillation_page import METERS, row
from test_pages import story_of, write_sweep

from dedistill.data.images.index import build_index
from dedistill.data.images.scan import scan
from dedistill.data.images.types import ImageSet
from dedistill.evaluation.distillation import EvalSettings
from dedistill.evaluation.evaluate import evaluate
from dedistill.evaluation.influence import Influence
from dedistill.evaluation.selection import select
from dedistill.evaluation.sweep import Candidate, Grid, guiders_at
from dedistill.io.atomic import replace_json
from dedistill.recipe import load_recipe
from dedistill.report.distillation import write_distillation_page
from dedistill.report.evaluation import write_evaluation
from dedistill.report.influence import write_influence
from dedistill.report.inversion import write_inversion_page
from dedistill.report.run import write_run_page
from dedistill.report.scan import write_scan_page
from dedistill.report.selection import write_selection_page
from dedistill.report.story import write_story_page
from dedistill.report.sweep import write_sweep_page
from lab.page import write_page

ROOT = Path(__file__).parent.parent.parent


def sweep(folder: Path) -> Path:
    """Large enough for small copies."""
    write_sweep(folder, skips=(0, 2), size=(128, 128), mode="RGB")
    return write_sweep_page(folder)


def story(folder: Path) -> Path:
    return write_story_page(folder / "story", story_of(folder))


def distillation(folder: Path) -> Path:
    few = [row(0.145, 1), row(0.0123, 4)]
    names = ["teacher", "<b>student</b> & co", "dedistilled"]
    candidates = {name: {"loss": [row(0.4 + i / 7)], "few_steps": few} for i, name in enumerate(names)}
    found = {"title": "How distilled", "settings": {"prompts": 24}, "reference": "teacher", "meters": METERS}
    found |= {"images": 40, "distinct_prompts": 24}
    return write_distillation_page(folder, found | {"candidates": candidates})


def influence(folder: Path) -> Path:
    distance = torch.rand(3, 2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = Influence(
        [f"transformer_blocks.{i}" for i in range(3)], ["image", "text"], [1 - i / 8 for i in range(8)], distance, 5
    )
    return write_influence(folder, found, dict.fromkeys(found.blocks, 4), 90, 100, str(folder / "recipe.toml"))


def scanned(folder: Path) -> Path:
    """Six images, two of them the same, and one without a caption."""
    data = folder / "data"
    data.mkdir()
    generator = np.random.default_rng(0)
    for i in range(7):
        noise = Image.fromarray(generator.integers(0, 255, (6, 6, 3), dtype=np.uint8)).resize((160, 120))
        noise.save(data / f"image {i}.png")
        if i < 6:
            (data / f"image {i}.txt").write_text(f"caption {i}\na longer caption of the {i}th image <b>with markup</b>")
    (data / "image 5.png").write_bytes((data / "image 4.png").read_bytes())
    index = build_index([ImageSet(str(data), missing_captions="quarantine")])
    return write_scan_page(folder / "page", index, scan(index, resolutions=[128]))


def run_rows(steps: int) -> list[dict]:
    """Rows as a run logs them, among them two bad steps, a return and a torn one left out by the reader."""
    generator = np.random.default_rng(0)
    rows = []
    for step in range(1, steps + 1):
        loss = 0.4 + 1 / (step + 1) + 0.05 * generator.standard_normal()
        bins = [None if generator.random() < 0.1 else float(loss * (2 - b / 8)) for b in range(8)]
        made = {"step": step, "loss": loss, "lr": 1e-4 * min(1, step / 10), "grad_norm": 2 * loss, "applied": True}
        made |= {"sigma_mean": 0.5, "sigma_loss": bins}
        if step % 10 == 0:
            made |= {"val_loss": loss, "val_loss_se": 0.01, "guidance_gap": 0.1, "straightness": 0.2, "few_step_gap": 0.03}
        rows.append(made)
    found = [{"sample": "set/<b>odd</b> name.png", "sigma": 0.4, "loss": "nan"}]
    rows[6] = {"step": 7, "loss": "nan", "lr": 1e-4, "grad_norm": "nan", "applied": False, "not_finite": found}
    rows[7] = {"step": 8, "loss": "0.51", "lr": 1e-4, "grad_norm": "912.0", "applied": False, "spike": []}
    rows[8]["quarantined"] = found
    return rows


def run(folder: Path) -> Path:
    lines = [json.dumps(row) for row in run_rows(60)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 61, "lo')  # the last write was cut off
    (folder / "recipe.json").write_text(json.dumps({"run": {"name": "a <run>"}, "train": {"steps": 100, "objective": "flow"}}))
    return write_run_page(folder)


def selection(folder: Path) -> Path:
    """Twelve cells, some of them burnt."""
    how = [at(8, cfg) for cfg in (1.0, 2.0, 4.0)]
    cells = [{"candidate": name, **a.facts, "nfe": a.nfe()} for name in ("base", "last <b>") for a in how]
    rows = []
    for i, cell in enumerate(cells):
        burnt = 0.01 * cell["cfg"] ** 2
        rows += [{**cell, "prompt": f"{p}", "seed": 0, "correct": float(p < 10 + 5 * i), "saturated": burnt} for p in range(40)]
    numbers = [
        {"key": "accuracy", "image": "correct", "adherence": True, "label": "accuracy", "better": "high", "help": "read"},
        {"key": "saturated", "image": "saturated", "tolerance": 0.05, "label": "saturated", "better": "low", "help": "burnt"},
    ]
    return write_selection_page(folder, select({"numbers": numbers, "cells": cells}, rows), "Selection of <b>")


def evaluation(folder: Path) -> Path:
    """Closed forms as candidates: with guidance baked in, and without."""
    prompts = [f"{i % 2}" + " " * i for i in range(16)]
    run = [
        Candidate(name, name, 3, lambda baked=baked: closed_form(baked=baked)) for name, baked in (("base", 3.0), ("last", 1.0))
    ]
    recipe = load_recipe("dedistill:digits/teacher")
    asked = EvalSettings(recipe, ClosedFormData(), prompts, judge=None, samples=32, steps=3, few=(1, 2), cfgs=(1.0, 3.0))
    grid = Grid(guiders_at((1.0, 3.0)), tuple(prompts), (0,))
    found = evaluate([run], asked, grid, folder, names="t", say=lambda line: None)
    return write_evaluation(folder, found, "t")[1]


def inversion(folder: Path) -> Path:
    """A row that gives the image back, and two edits."""
    generator = np.random.default_rng(0)
    cells = [{"prompt": p, "eta": eta, "psnr": 10 + 20 * eta} for p in (None, "a <b>cat</b>", "a dog") for eta in (0, 0.5, 1)]
    for i, place in enumerate([{}, {}, *cells]):
        image = Image.fromarray(generator.integers(0, 255, (4, 4, 3), dtype=np.uint8)).resize((128, 96))
        image.save(folder / f"{i}.png")
        place["file"] = f"{i}.png"
    found = {"title": "photo.jpg by <last>", "settings": {"seed": "0"}, "source": "0.png", "decoded": "1.png", "limit": 31.5}
    replace_json(folder / "inversion.json", found | {"cells": cells})
    return write_inversion_page(folder)


def lab(folder: Path) -> Path:
    return write_page(json.loads((ROOT / "lab/results/lab.json").read_text()), folder)


PAGES = {
    "sweep": sweep,
    "story": story,
    "distillation": distillation,
    "influence": influence,
    "scan": scanned,
    "run": run,
    "selection": selection,
    "evaluation": evaluation,
    "inversion": inversion,
    "lab": lab,
}
