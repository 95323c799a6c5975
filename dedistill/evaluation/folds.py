"""Every image of a small set held out once: the runs of one recipe over K folds, measured each on its fold, joined."""

import math
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dedistill.errors import UserError, amount
from dedistill.evaluation.candidates import Compared
from dedistill.evaluation.distillation import EvalSettings, check_comparable, compared, evaluate_candidate
from dedistill.evaluation.meters import RatioEstimate
from dedistill.evaluation.sweep import Candidate
from dedistill.recipe.load import fold_ending
from dedistill.recipe.resolve import filled


@dataclass(frozen=True)
class Fold:
    """The candidates of the run that did not see the fold's images, and what they are asked about these."""

    candidates: list[Candidate]
    settings: EvalSettings


def fold_of(opened: Compared, samples: int) -> Fold:
    """samples: of held-out images of this fold."""
    ending = fold_ending(filled(opened.data.data.fold, "data.fold"))
    return Fold(
        [replace(c, name=c.name.removesuffix(ending)) for c in opened.candidates],
        EvalSettings(
            opened.data,
            opened.held_out(),
            prompts=[],
            judge=None,
            samples=samples,
            steps=1,
            few=(),
            cfgs=(1.0,),
            solver=opened.data.sample.solver,
        ),
    )


def measure_folds(
    folds: list[Fold], *, reference: str | None, title: str, results: Path, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """As ``distillation.measure``, of what held-out images tell, over all folds: a candidate is all of its name.

    Meters of paths and of guidance are left out: their prompts need not be held out, so one run tells as much. Raises
    UserError where the folds have other candidates, or share an image.
    """
    names = [c.name for c in folds[0].candidates]
    for k, fold in enumerate(folds, 1):
        if (own := [c.name for c in fold.candidates]) != names:
            raise UserError(f"fold {k} has other candidates than fold 1: {', '.join(own)}; there {', '.join(names)}")
    reference = reference or names[0]
    check_comparable(names, reference, folds[0].settings, prompts=False)
    readings: dict[str, dict[str, RatioEstimate]] = {}
    places: dict[str, dict[str, list[float]]] = {}
    for i, name in enumerate(names):
        of_folds = [
            evaluate_candidate(fold.candidates[i], fold.settings, results / f"fold{k}", held_out_only=True)
            for k, fold in enumerate(folds, 1)
        ]
        readings[name] = {key: joined([result.readings[key] for result in of_folds]) for key in of_folds[0].readings}
        places[name] = of_folds[0].places
        say(f"{name}: held-out loss {readings[name]['loss'].value[0]:.4g}")
    samples, images = sum(fold.settings.samples for fold in folds), len(readings[reference]["loss"].top)
    settings = {
        "held-out samples": f"{samples}, of {amount(images, 'image')}, each held out from the run that it is asked of",
        "folds": len(folds),
        "intervals": "95 %, bootstrap over images",
    }
    return {"title": title, "settings": settings, "distinct_prompts": None, **compared(readings, places, reference, (1.0,))}


def joined(readings: list[RatioEstimate]) -> RatioEstimate:
    """One reading of all units, each of which is in one of the readings.

    The runs were trained on one another's held-out images, so that their errors are not independent, and plain intervals
    miss the truth too often (Bengio & Grandvalet 2004, JMLR 5). These are wider by the root of one plus the held-out over the
    training images, as a sample apart from both would be (after Nadeau & Bengio 2003, Mach. Learn. 52).
    """
    folds = len(readings)
    top, bottom = (np.concatenate(parts) for parts in zip(*((r.top, r.bottom) for r in readings)))
    return RatioEstimate(top, bottom, math.sqrt(folds / (folds - 1)))


def arguments_of_folds(args: Namespace) -> list[Namespace]:
    """The arguments of a command on one recipe, once per fold."""
    return [Namespace(**vars(args) | {"set": [*args.set, f"data.fold=[{k}, {args.folds}]"]}) for k in range(1, args.folds + 1)]
