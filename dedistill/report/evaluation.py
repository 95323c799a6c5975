"""After a run: how distilled it still is, which average to take, and how to sample from it.

Two stages, so that it ends in minutes: every candidate's loss on the same held-out samples; then pictures, and the other
meters, of those that may be worth it: the base, the last weights, and the averages that the loss cannot tell from the best.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from dedistill.errors import UserError
from dedistill.report.distillation import Questions, ask, measure
from dedistill.report.sweep_files import read_index
from dedistill.sampling.meters import Reading
from dedistill.sampling.selection import Comparison, compare_with_best, select
from dedistill.sampling.sweep import Candidate, Grid, sweep

MOST_AVERAGES = 3
"""Averages of a run whose pictures are made."""


def evaluate(
    runs: list[list[Candidate]],
    questions: Questions,
    grid: Grid,
    out: Path,
    *,
    title: str,
    by: str | None = None,
    reference: str | None = None,
    say: Callable[[str], None] = print,
) -> dict:
    """Measure, sweep and select the candidates of ``runs``, with intermediate results in ``out`` to continue from.

    reference: candidate that the others are compared with, default the first. Returns {"losses", "distillation", "scores",
    "selection"}: a row per candidate, what ``measure``, ``sweep`` and ``select`` return. Raises UserError as they do.
    """
    candidates = [c for run in runs for c in run]
    names = [c.name for c in candidates]
    if len(set(names)) != len(names):
        raise UserError(f"two candidates share a name: {', '.join(names)}", exit_code=2)
    reference = reference or names[0]
    if reference not in names:
        raise UserError(f"--reference: no candidate '{reference}'; there are {', '.join(names)}", exit_code=2)
    kept = out / "distillation" / "answers"
    losses = {}
    for c in candidates:
        losses[c.name] = ask(c, questions, kept, held_out_only=True).readings["loss"]
        say(f"{c.name}: held-out loss {losses[c.name].value[0]:.4g}")
    looked_at = [c for run in runs for c in shortlist(run, losses)]
    looked_at = [c for c in candidates if c in looked_at or c.name == reference]
    distillation = measure(looked_at, questions, reference=reference, title=title, kept=kept, say=say)
    scores = sweep(looked_at, grid, out / "sweep", title=title, judge=questions.judge, say=say)
    selection = select(scores, read_index(out / "sweep" / "index.json"), by=by, reference=reference)
    rows = _loss_rows(compare_with_best(_together(losses, names), "low"), names, {c.name for c in looked_at})
    return {"losses": rows, "distillation": distillation, "scores": scores, "selection": selection}


def shortlist(run: list[Candidate], losses: dict[str, Reading]) -> list[Candidate]:
    """The candidates of a run whose pictures are made: its base and last weights, and the best averages.

    Those of its averages that may be the best of them by held-out loss, at most three, the lowest losses first.
    """
    averages = [c for c in run if c.average]
    if not averages:
        return run
    found = compare_with_best(_together(losses, [c.name for c in averages]), "low")
    best = [averages[i] for i in np.argsort(found.value, kind="stable") if found.may_be_best[i]][:MOST_AVERAGES]
    return [c for c in run if not c.average or c in best]


def _together(losses: dict[str, Reading], names: list[str]) -> Reading:
    """The losses of several candidates as the places of one reading: all were asked the same samples in the same order."""
    own = [losses[name] for name in names]
    return Reading(np.hstack([r.top for r in own]), np.hstack([r.bottom for r in own]), own[0].strata)


def _loss_rows(found: Comparison, names: list[str], looked_at: set[str]) -> list[dict]:
    return [
        {
            "candidate": name,
            "value": float(found.value[i]),
            "low": float(found.low[i]),
            "high": float(found.high[i]),
            "may_be_best": bool(found.may_be_best[i]),
            "looked_at": name in looked_at,
        }
        for i, name in enumerate(names)
    ]
