"""The ladder's table, claims and figure in docs/reflow.md, from its scores over seeds."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dedistill.report.plots import line_plot, value_label
from lab.verdicts import mean_interval

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "lab" / "results" / "ladder.json"
OF_LOSSES = RESULTS.with_name("ladder_losses.json")
Scores = dict[str, dict[str, float]]
"""Of one seed, by model."""
MODELS = {
    "base": "base, by diffusion",
    "bridge": "reflow from the bridge",
    "naive": "reflow, naive",
    "instaflow": "reflow, naive with InstaFlow's sign",
    "rectified": "Rectified Diffusion",
    "onestep": "bridge, then one step",
}
COLUMNS = {
    "first_loss": "loss at the first step",
    "near_noise": "last loss near noise",
    "straightness": "straightness",
    "error_1": "one-step error",
    **{f"frechet_{n}": f"Frechet, {n}" for n in (1, 2, 4, 8, 32)},
}


@dataclass(frozen=True)
class Claim:
    """What was expected before anything was run: ``value`` of every seed on the right side of ``bound``."""

    text: str
    value: Callable[[Scores], float]
    bound: float
    above: bool = True

    def holds(self, scores: Scores) -> bool:
        return (self.value(scores) > self.bound) == self.above


CLAIMS = (
    Claim("the bridge's first loss is below .5 of predicting nothing", lambda s: s["bridge"]["first_loss"], 0.5, above=False),
    Claim("the naive first loss is above .9", lambda s: s["naive"]["first_loss"], 0.9),
    Claim("so is that with InstaFlow's sign", lambda s: s["instaflow"]["first_loss"], 0.9),
    Claim("reflow straightens paths 20 times", lambda s: s["base"]["straightness"] / s["bridge"]["straightness"], 20),
    Claim("one step errs 5 times less than the base's", lambda s: s["base"]["error_1"] / s["onestep"]["error_1"], 5),
    Claim(
        "reflow lowers the Frechet distance in one step", lambda s: s["bridge"]["frechet_1"] - s["base"]["frechet_1"], 0, False
    ),
    Claim("and raises that in 32 steps", lambda s: s["bridge"]["frechet_32"] - s["base"]["frechet_32"], 0),
)


def number(values: list[float]) -> str:
    """The mean, and in brackets Student's interval of 95 %, where there is more than one seed."""
    if len(values) < 2:
        return value_label(values[0])
    mean, low, high = map(value_label, mean_interval(values))
    return f"{mean} [{low}, {high}]"


def lines(found: dict) -> list[str]:
    """Tables in Markdown: models by scores, and what was expected."""
    seeds: list[Scores] = found["seeds"]
    rows = []
    for model, label in MODELS.items():
        cells = [number([s[model][key] for s in seeds]) if key in seeds[0][model] else "" for key in COLUMNS]
        rows.append([label, *cells])
    longer = [value_label(found["longer"][key]) if key in found["longer"] else "" for key in COLUMNS]
    rows.insert(2, ["the same, six times as long (one seed)", *longer])
    table = [["", *COLUMNS.values()], ["---"] * (1 + len(COLUMNS)), *rows]
    expected = [["expected", "found, seed by seed", ""], ["---"] * 3]
    for claim in CLAIMS:
        values = ", ".join(value_label(claim.value(s)) for s in seeds)
        kept = sum(map(claim.holds, seeds))
        verdict = "yes" if kept == len(seeds) else f"{kept} of {len(seeds)}" if kept else "**no**"
        expected.append([claim.text, values, verdict])
    return [f"| {' | '.join(row)} |" for row in table] + [""] + [f"| {' | '.join(row)} |" for row in expected]


LOSS_ROWS = {
    "bridge": "reflow",
    "u_shaped": "reflow, U-shaped density",
    "huber": "reflow, pseudo-Huber",
    "both": "reflow, both",
    "onestep": "one step",
    "onestep_huber": "one step, pseudo-Huber",
}
AGAINST = {"u_shaped": "bridge", "huber": "bridge", "both": "bridge", "onestep_huber": "onestep"}
LOSS_COLUMNS = ("straightness", "error_1", "frechet_1", "frechet_4", "frechet_32")


def loss_lines(found: dict) -> list[str]:
    """Table in Markdown: reflow and one step, and by how much each change of the loss moves a score, seed by seed."""
    seeds: list[Scores] = found["seeds"]
    rows = [["", *(COLUMNS[key] for key in LOSS_COLUMNS)], ["---"] * (1 + len(LOSS_COLUMNS))]
    for model, label in LOSS_ROWS.items():
        if model not in AGAINST:
            rows.append([label, *(number([s[model][key] for s in seeds]) for key in LOSS_COLUMNS)])
            continue
        changes = [number([s[model][key] - s[AGAINST[model]][key] for s in seeds]) for key in LOSS_COLUMNS]
        rows.append([f"{label}: change", *changes])
    return [f"| {' | '.join(row)} |" for row in rows]


def figure(found: dict) -> str:
    """Frechet distances over steps, means and intervals over seeds."""
    series = {}
    for model, label in MODELS.items():
        points = []
        for n in (1, 2, 4, 8, 32):
            values = [s[model][f"frechet_{n}"] for s in found["seeds"]]
            if len(values) < 2:
                points.append((math.log2(n), values[0]))
            else:
                mean, low, high = mean_interval(values)
                points.append((math.log2(n), mean, max(low, 0.5 * float(np.min(values))), high))
        series[label] = points
    return line_plot(
        series, title="Frechet distance to real digits", xlabel="Euler steps, as powers of two", ylabel="distance", log_y=True
    )


def write_report() -> list[Path]:
    """Write the tables of the committed results into docs/reflow.md between their marks, and the figure; returns both."""
    page, image = ROOT / "docs" / "reflow.md", ROOT / "docs" / "images" / "ladder.svg"
    text, found = page.read_text(), json.loads(RESULTS.read_text())
    for mark, table in (("ladder", lines(found)), ("losses", loss_lines(json.loads(OF_LOSSES.read_text())))):
        before, after = text.partition(f"<!-- {mark} -->")[0], text.partition(f"<!-- /{mark} -->")[2]
        text = "\n".join([f"{before}<!-- {mark} -->", *table, f"<!-- /{mark} -->{after}"])
    page.write_text(text)
    image.write_text(figure(found) + "\n")
    return [page, image]
