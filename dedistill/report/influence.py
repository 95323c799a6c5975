"""What a measurement of layer influence leaves behind: numbers, a heat map, and a recipe with sizes to match."""

import os
from pathlib import Path
from typing import Any

from dedistill.evaluation.influence import FACTORS, Influence, recipe_fragment
from dedistill.io.atomic import replace_file, replace_json
from dedistill.recipe.shipped import PREFIX
from dedistill.report.pages import figure, render


def write_influence(out: Path, found: Influence, factors: dict[str, int], used: int, budget: int, recipe: str) -> Path:
    """Write ``influence.json``, ``influence.toml`` and ``index.html`` into ``out``; returns the page's path.

    factors: block -> LoKr factor, ``used`` trained parameters within ``budget``; recipe: the one that was measured, a file or
    dedistill:NAME, which influence.toml extends.
    """
    out.mkdir(parents=True, exist_ok=True)
    influence = found.per_block()
    numbers = {
        "prompts": found.prompts,
        "sigmas": found.sigmas,
        "budget": budget,
        "parameters": used,
        "blocks": [
            {"name": name, "influence": influence[name], "factor": factors[name], **dict(zip(found.streams, rows.tolist()))}
            for name, rows in zip(found.blocks, found.distance)
        ],
    }
    replace_json(out / "influence.json", numbers)
    note = f"LoKr factors by layer influence: {used:,} trained parameters of {budget:,} allowed. Extend this file in a recipe."
    extends = recipe if recipe.startswith(PREFIX) else Path(os.path.relpath(recipe, out)).as_posix()
    replace_file(out / "influence.toml", recipe_fragment(factors, extends, note).encode())
    page = out / "index.html"
    replace_file(page, render("influence.html.j2", **_values(numbers, found, recipe)).encode())
    return page


def all_alike(factors: dict[str, int]) -> str:
    """What to say where the budget leaves nothing to share out; empty where it does."""
    if set(factors.values()) != {FACTORS[-1]}:
        return ""
    return (
        f"the budget allows factor {FACTORS[-1]} on every block, so that factors tell nothing of influence: give a smaller "
        "--budget"
    )


def _values(numbers: dict[str, Any], found: Influence, recipe: str) -> dict[str, Any]:
    means = found.distance.mean(2)
    curves = {stream: [(i, float(means[i, s])) for i in range(len(means))] for s, stream in enumerate(found.streams)}
    return {
        "title": f"Layer influence: {Path(recipe).stem}",
        "numbers": numbers,
        "streams": found.streams,
        "alike": all_alike({block["name"]: block["factor"] for block in numbers["blocks"]}),
        "most": float(found.distance.max()) or 1.0,
        "plot": figure(
            curves,
            title="Influence by block",
            xlabel="block",
            ylabel="angular distance",
            help="Mean over noise levels; blocks in the order of the network.",
        ),
    }
