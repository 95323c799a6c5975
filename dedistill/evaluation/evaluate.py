"""After a run: how distilled it still is, which average to take, and how to sample from it.

Two stages, so that it ends in minutes: every candidate's loss on the same held-out samples; then images, and the other
meters, of those that may be worth it: the base, the last weights, and the averages that the loss cannot tell from the best.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dedistill.evaluation.distillation import EvalSettings, check_comparable, evaluate_candidate, known_bound, measure
from dedistill.evaluation.judges import ClipJudge
from dedistill.evaluation.meters import RatioEstimate
from dedistill.evaluation.numbers import check_by
from dedistill.evaluation.prompts import check_prompts
from dedistill.evaluation.selection import Comparison, compare_with_best, select
from dedistill.evaluation.sweep import Candidate, Grid, read_index, sweep
from dedistill.io.ownership import claim

MOST_AVERAGES = 3
"""Averages of a run whose images are made."""


def evaluate(
    runs: list[list[Candidate]],
    settings: EvalSettings,
    grid: Grid,
    out: Path,
    *,
    names: str,
    by: str | None = None,
    reference: str | None = None,
    clip: ClipJudge | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure, sweep and select the candidates of ``runs``, with intermediate results in ``out`` to continue from.

    names: of the runs. reference: candidate that the others are compared with, default the first. Returns {"losses",
    "distillation", "selection", "trained"}: a row per candidate, what ``measure`` and ``select`` return, and how many of the
    prompts were trained on. Raises UserError as they do.
    """
    candidates = [c for run in runs for c in run]
    known = [c.name for c in candidates]
    reference = reference or known[0]
    check_comparable(known, reference, settings)
    check_prompts(grid.prompts)
    check_by(by, {name for name, who in (("judge", settings.judge), ("clip", clip)) if who})
    for part in ("sweep", "distillation", "selection"):
        claim(out / part, part, "--out")
    results = out / "distillation" / "answers"
    losses = {}
    for c in candidates:
        losses[c.name] = evaluate_candidate(c, settings, results, held_out_only=True).readings["loss"]
        say(f"{c.name}: held-out loss {losses[c.name].value[0]:.4g}")
    chosen = {c.name for run in runs for c in shortlist(run, losses)} | {reference}
    looked_at = [c for c in candidates if c.name in chosen]
    distillation = measure(
        looked_at, settings, reference=reference, title=f"How distilled still: {names}", results=results, say=say
    )
    scores = sweep(looked_at, grid, out / "sweep", title=f"CFG sweep: {names}", judge=settings.judge, clip=clip, say=say)
    order = sorted(known, key=lambda name: losses[name].value[0])
    selection = select(scores, read_index(out / "sweep" / "index.json"), by=by, order=order, reference=reference)
    rows = _loss_rows(compare_with_best(_together(losses, known), "low"), candidates, chosen)
    return {"losses": rows, "distillation": distillation, "selection": selection, "trained": len(grid.trained)}


def shortlist(run: list[Candidate], losses: dict[str, RatioEstimate]) -> list[Candidate]:
    """The candidates of a run whose images are made: its base and last weights, and the best averages.

    Of its averages that may be the best of them by held-out loss, at most three, spread from the lowest loss to the highest:
    neighbours among ten averages differ too little to be worth images of their own.
    """
    averages = [c for c in run if c.average]
    if not averages:
        return run
    found = compare_with_best(_together(losses, [c.name for c in averages]), "low")
    best = [averages[i] for i in np.argsort(found.value, kind="stable") if found.may_be_best[i]]
    best = [best[i] for i in np.linspace(0, len(best) - 1, min(MOST_AVERAGES, len(best))).round().astype(int)]
    return [c for c in run if not c.average or c in best]


def _together(losses: dict[str, RatioEstimate], names: list[str]) -> RatioEstimate:
    """The losses of several candidates as the places of one reading: all were asked the same samples in the same order."""
    own = [losses[name] for name in names]
    return RatioEstimate(np.hstack([r.top for r in own]), np.hstack([r.bottom for r in own]))


def _loss_rows(found: Comparison, candidates: list[Candidate], looked_at: set[str]) -> list[dict[str, Any]]:
    return [
        {
            "candidate": c.name,
            "average": c.average,
            "value": float(found.value[i]),
            "low": known_bound(found.low[i]),
            "high": known_bound(found.high[i]),
            "may_be_best": bool(found.may_be_best[i]),
            "looked_at": c.name in looked_at,
        }
        for i, c in enumerate(candidates)
    ]
