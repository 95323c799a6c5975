"""docs/lab.md, its image and the laboratory's page, from the scores of every seed."""

from pathlib import Path

import numpy as np

from dedistill.io.atomic import make_folder
from lab.forest import Row, forest_plot
from lab.runs import LENGTHS
from lab.tricks import SCORES, TRICKS, Comparison, Trick
from lab.verdicts import change, count, effect, mean_interval, sentence, word

SHOWN = ("loss", "accuracy_1", "accuracy_2", "frechet_2", "frechet_4", "precision_4", "saturated_4")
INTRO = """# What each trick is worth: the laboratory

    {command}

A teacher of 463 k parameters learns pairs of 8x8 digits from noisy captions; a student is distilled from it with guidance
baked in; the student is de-distilled as `dedistill:digits/dedistill` says. Every row below changes one thing. {seeds} seeds,
each with its own teacher, student and draws; {steps} steps unless a row says otherwise; {cpu} minutes of one core in all.
Differences are taken between runs of the same student and the same draws; brackets are Student's intervals of 95 % over
seeds. *Helps*, *hurts* and *no difference seen* are told by one score, chosen before anything was run. *No difference seen*
means that the interval holds zero, not that there is none: its width says how large one could be. Of {count} comparisons two
or three would stand out by chance, and of the other scores more. All seeds are asked the same held-out samples, prompts and
noise, whose chance is not in the intervals. A small network on small images shows mechanisms, not budgets; what follows for
a model of 12 B is a guess.

Held-out loss: flow matching, {held_out} held-out samples, all sigmas alike. Images: {prompts} prompts, 16 Euler steps.
Accuracy: an independent classifier reads the digits as asked; at CFG 1 it has no better end, as an honest model of these
noisy captions has the teacher's. Frechet distance and precision: against real digits, in 20 components. Saturated: share of
pixels beyond the range of the data.
"""


def write_report(found: dict, folder: Path) -> Path:
    """Write ``lab.md`` and ``images/lab.svg`` into ``folder``; returns the former."""
    make_folder(folder / "images")
    for key, file in IMAGES.items():
        (folder / "images" / file).write_text(forest(found["scores"], key, paper="#ffffff") + "\n")
    page = folder / "lab.md"
    page.write_text("\n".join(_document(found)))
    return page


IMAGES = {"loss": "lab.svg", "frechet_4": "lab_frechet.svg"}


def forest(scores: list[dict], key: str, paper: str | None = None) -> str:
    """What every comparison does to one score."""
    rows = []
    for trick in TRICKS:
        found = [(c, effect(scores, c.run, c.control, key)) for c in trick.comparisons]
        found = [(c, e) for c, e in found if e]
        if found:
            rows.append(Row(trick.title))
            rows += [Row(_short(c), (e.low, e.mean, e.high), word(e, key)) for c, e in found]
    label = SCORES[key].label
    return forest_plot(rows, title=f"What changes the {label}", xlabel="difference; lower is better", paper=paper)


def _document(found: dict) -> list[str]:
    scores, scale = found["scores"], found["scale"]
    lines = INTRO.format(
        command=f"python -m lab --seeds {found['seeds']}",
        seeds=found["seeds"],
        steps=scale["steps"],
        cpu=round(found["cpu_seconds"] / 60),
        count=count(),
        held_out=scale["held_out"],
        prompts=scale["prompts"],
    ).splitlines()
    for key, file in IMAGES.items():
        lines += ["", f"![Differences of the {SCORES[key].label}, with intervals](images/{file})"]
    lines += ["", "## Verdicts", ""]
    lines += [*(f"- **{title}.** {text}" for title, text in verdicts(scores)), ""]
    for trick in TRICKS:
        lines += [f"## {trick.title}", "", trick.question, "", *_table(*trick_table(trick, scores)), ""]
    lines += ["## Variance under stratified timesteps", "", VARIANCE, "", *_table(*variance_table(scores)), ""]
    lines += ["## Padding", "", PADDING, "", *_table(*padding_table(scores)), ""]
    lines += ["## All models", "", "Means over seeds, and their standard deviations.", "", *_table(*models_table(scores))]
    return [*lines, ""]


def verdicts(scores: list[dict]) -> list[tuple[str, str]]:
    """A title and a sentence for every trick."""
    sentences = [(trick.title, sentence(trick, scores)) for trick in TRICKS]
    return [
        *sentences,
        ("Variance under stratified timesteps", variance_sentence(scores)),
        ("Padding", padding_sentence(scores)),
    ]


def main_table(scores: list[dict]) -> list[str]:
    """What docs/tricks.md shows: the main comparisons, each by its own score."""
    rows = []
    for trick in TRICKS:
        for c in (c for c in trick.comparisons if c.main):
            found = effect(scores, c.run, c.control, trick.primary)
            rows.append([trick.title, _short(c), SCORES[trick.primary].label, change(found), word(found, trick.primary)])
    return _table(["trick", "variant", "by", "change [95 %]", "verdict"], rows)


def with_main_table(readme: str, scores: list[dict]) -> str:
    """``readme`` with the main table between its two marks."""
    before, after = readme.partition("<!-- lab -->")[0], readme.partition("<!-- /lab -->")[2]
    return "\n".join([before + "<!-- lab -->", *main_table(scores), "<!-- /lab -->" + after])


def _table(heads: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows)]


def _short(comparison: Comparison) -> str:
    return comparison.label.rstrip(",")


def trick_table(trick: Trick, scores: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: every score's change, and the verdict of the primary one."""
    keys = (trick.primary, *trick.others)
    rows = []
    for c in trick.comparisons:
        effects = {key: effect(scores, c.run, c.control, key) for key in keys}
        rows.append(
            [_short(c), word(effects[trick.primary], trick.primary), *(change(e) if e else "" for e in effects.values())]
        )
    return ["", "verdict", *(SCORES[key].label for key in keys)], rows


VARIANCE = (
    "At the weights of the finished recipe, batches of 32: variance over batches with independent timesteps, over that with "
    "stratified ones. Above 1, stratifying calms. Geometric means over seeds, with intervals."
)
KINDS = {"loss": "of the loss", "norm": "of the gradient's norm", "gradient": "of the gradient itself"}


def _ratios(scores: list[dict], density: str, key: str) -> tuple[float, float, float]:
    mean, low, high = mean_interval(np.log([seed[density][key] for seed in scores]))
    return float(np.exp(mean)), float(np.exp(low)), float(np.exp(high))


def variance_table(scores: list[dict]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for density, name in (("beta", "Beta(2,2)"), ("uniform", "uniform")):
        found = [_ratios(scores, f"variance {density}", key) for key in KINDS]
        rows.append([name, *(f"{mean:.2f} [{low:.2f}, {high:.2f}]" for mean, low, high in found)])
    return ["", *KINDS.values()], rows


def variance_sentence(scores: list[dict]) -> str:
    parts = []
    for key, name in KINDS.items():
        for density, label in (("beta", "Beta(2,2)"), ("uniform", "uniform")):
            mean, low, high = _ratios(scores, f"variance {density}", key)
            what = "falls" if low > 1 else "rises" if high < 1 else "shows no difference"
            parts.append(f"that {name} {what} under {label} (ratio {mean:.2f} [{low:.2f}, {high:.2f}])")
    return f"Of the variances, {'; '.join(parts)}."


PADDING = (
    "The same prompts, of at most 8 tokens, padded to several lengths; training padded to 12. Accuracy, and Frechet distance, "
    "at CFG 2, means over seeds; at the right, the change of the accuracy from 8 to 48 tokens."
)
MODELS = {"teacher": "teacher", "student": "student", "mask_off": "de-distilled, no mask", "base": "de-distilled, masked"}


def _padded(scores: list[dict], model: str, length: int, key: str) -> np.ndarray:
    return np.array([seed[f"{model}, {length} tokens"][key] for seed in scores])


def padding_table(scores: list[dict]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for model, name in MODELS.items():
        cells = [
            f"{_padded(scores, model, n, 'accuracy').mean():.3f}, {_padded(scores, model, n, 'frechet').mean():.2f}"
            for n in LENGTHS
        ]
        mean, low, high = _padding_loss(scores, model)
        rows.append([name, *cells, f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"])
    return ["", *map(str, LENGTHS), "48 less 8"], rows


def _padding_loss(scores: list[dict], model: str) -> tuple[float, float, float]:
    return mean_interval(_padded(scores, model, 48, "accuracy") - _padded(scores, model, 8, "accuracy"))


def padding_sentence(scores: list[dict]) -> str:
    def padded(model: str) -> str:
        mean, low, high = _padding_loss(scores, model)
        what = "loses" if high < 0 else "gains" if low > 0 else "shows no difference of"
        size = (
            ""
            if low <= 0 <= high
            else f" {abs(mean):.3f} [{min(abs(low), abs(high)):.3f}, {max(abs(low), abs(high)):.3f}] of its"
        )
        return f"{MODELS[model]} {what}{size} accuracy"

    return f"From 8 to 48 tokens, {'; '.join(f'the model {padded(m)}' for m in ('mask_off', 'base'))}."


def models_table(scores: list[dict]) -> tuple[list[str], list[list[str]]]:
    names = [n for n in scores[0] if any(k in scores[0][n] for k in ("frechet_2", "frechet_one"))]
    rows = []
    for name in names:
        values = [[seed[name].get(key) for seed in scores] for key in SHOWN]
        rows.append([f"`{name}`", *("" if None in v else f"{np.mean(v):.3f} ± {np.std(v, ddof=1):.3f}" for v in values)])
    return ["run", *(SCORES[key].label for key in SHOWN)], rows
