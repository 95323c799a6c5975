"""How distilled candidates still are: every meter on the same prompts, noise and held-out samples, with intervals."""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from dedistill.data.source import Source
from dedistill.errors import UserError, amount
from dedistill.evaluation.judges import DigitJudge
from dedistill.evaluation.meters import GUIDED, RatioEstimate, guidance_meters, interval, path_meters
from dedistill.evaluation.prompts import distinct
from dedistill.evaluation.sweep import Candidate
from dedistill.evaluation.validation import held_out_meters
from dedistill.flow.solvers import sigma_grid
from dedistill.io.atomic import checksummed, make_folder, read_checksummed, replace_file
from dedistill.models.model import CHUNK, Model
from dedistill.objectives.base import NoisyBatch, objective_for
from dedistill.recipe import Recipe
from dedistill.sampling.sampler import Sampling, start_noise

# --- results of candidates, kept on disk --------------------------------------------------------------------------


VERSION = 4
"""Results of another version of the meters are not used."""


@dataclass(frozen=True)
class EvalResult:
    """Readings by meter, the places of those that have an axis, and the shape of the model's images."""

    readings: dict[str, RatioEstimate]
    places: dict[str, list[float]]
    image: tuple[int, ...]


def cached_result(file: Path | None, key: dict[str, Any], make: Callable[[], EvalResult]) -> EvalResult:
    """The result stored in ``file`` under the same ``key``, else that of ``make``, which is stored. None: never stored."""
    if file is None:
        return make()
    key = json.loads(json.dumps({**key, "version": VERSION}))
    try:
        known = read_checksummed(file)
        if known["key"] == key:
            return _result(_current_names(known))
    except (OSError, ValueError, KeyError):
        pass  # not there yet, or damaged: measured again
    result = make()
    make_folder(file.parent)
    replace_file(file, checksummed({"key": key, **_table(result)}))
    return result


def result_file(folder: Path, name: str, part: str) -> Path:
    """Where a part of the results of candidate ``name`` is stored."""
    return folder / f"{re.sub('[^A-Za-z0-9_.-]+', '_', name)}.{part}.json"


def _table(result: EvalResult) -> dict[str, Any]:
    readings = {key: {"top": r.top.tolist(), "bottom": r.bottom.tolist()} for key, r in result.readings.items()}
    return {"image": list(result.image), "places": result.places, "readings": readings}


_EARLIER = {"picture": "image", "bend": "curvature", "turning": "turning_angle"}
"""What earlier versions called a key -> what it is called now."""


def _current_names(table: dict[str, Any]) -> dict[str, Any]:
    """``table`` with the keys of earlier versions renamed, down to the meters."""
    names = {key: _EARLIER.get(key, key) for key in table}
    return {names[key]: _current_names(v) if key in ("places", "readings") else v for key, v in table.items()}


def _result(table: dict[str, Any]) -> EvalResult:
    readings = {key: RatioEstimate(np.array(r["top"]), np.array(r["bottom"])) for key, r in table["readings"].items()}
    return EvalResult(readings, table["places"], tuple(table["image"]))


# --- how distilled candidates still are ------------------------------------------------------------------------------


BINS = 8
SMALLEST = 0.01
"""Share of the reference's value. A difference that is certain and smaller is not called one."""


@dataclass(frozen=True)
class Meter:
    """axis: what its places are, None for a single number. Help says what the number is and what distilling does to it."""

    key: str
    label: str
    help: str
    axis: str | None = None


METERS = [
    Meter("loss", "held-out loss", "Flow-matching loss on held-out samples. Distilling raises it, de-distilling wins it back."),
    Meter(
        "guidance",
        "guidance gap",
        "Squared difference between the velocities with and without a caption, mean of all pixels, on held-out samples. "
        "Guidance that was baked in widens it, by about the square of its scale.",
    ),
    Meter(
        "straightness", "straightness", "Distance of velocities from the chord of their path, as a share of it; 0 is straight."
    ),
    Meter("turning_angle", "turning angle", "Degrees by which the velocity turns between noise and image; 0 is straight."),
    Meter("loss_by_sigma", "held-out loss by sigma", "1 is noise.", "sigma"),
    Meter("guidance_by_sigma", "guidance gap by sigma", "1 is noise.", "sigma"),
    Meter(
        "few_steps",
        "few-step gap",
        "Squared distance between the ends of few and of many steps of the solver, as a share of the path's squared length. "
        "Distilling to n steps narrows it at n steps and more.",
        "steps",
    ),
    Meter("curvature", "curvature along the path", "What straightness adds up, step by step; 1 is noise.", "sigma"),
    Meter(
        "one_step",
        "one-step error along the path",
        "Squared distance between the end of a path and where a single Euler step from a state of it leads, as a share of the "
        "path's squared length; 1 is noise, and there it is what a one-step image misses.",
        "sigma",
    ),
    Meter("saturated", "saturated", "Share of pixels burnt beyond the range of the data.", "CFG scale"),
    Meter("contrast", "contrast", "Standard deviation of the pixels.", "CFG scale"),
    Meter("blur", "blur", "Share of steps between pixels that blurring again leaves.", "CFG scale"),
    Meter("shadow", "shadow", "Share of light missing in large soft dark places.", "CFG scale"),
    Meter("correct", "accuracy", "Share of digits that an independent classifier reads as asked.", "CFG scale"),
    Meter("realistic", "fidelity", "Share of digits that lie among real ones.", "CFG scale"),
]
RESPONSES = (*GUIDED, "correct", "realistic")


@dataclass(frozen=True)
class EvalSettings:
    """What is measured of every candidate. samples: held-out samples of ``recipe``'s data; few: step counts; cfgs: rising;
    trained: those of the prompts that were trained on."""

    recipe: Recipe
    source: Source
    prompts: list[str]
    judge: DigitJudge | None
    samples: int
    steps: int
    few: tuple[int, ...]
    cfgs: tuple[float, ...]
    trained: frozenset[str] = frozenset()
    solver: str = "euler"

    def batches(self, model: Model) -> list[NoisyBatch]:
        objective = objective_for(self.recipe, self.source, model.shift, model.components.schedule)
        return objective.validation_batches(self.samples, model.chunk)

    @cached_property
    def identity(self) -> str:
        """Hash of all of it: the held-out samples themselves, the prompts and the settings."""
        judge = self.judge.identity if self.judge else None
        everything = [self.prompts, self.solver, self.steps, self.few, self.cfgs, judge, BINS]
        digest = hashlib.sha256(json.dumps(everything).encode())
        for batch in objective_for(self.recipe, self.source, lambda shape: 1.0).validation_batches(self.samples, CHUNK):
            digest.update(json.dumps(batch.captions).encode())
            for tensor in (batch.noisy, batch.sigma, batch.target):
                digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def places(self, model: Model) -> dict[str, list[float]]:
        """Where each meter with an axis is read."""
        bins = [(b + 0.5) / BINS for b in range(BINS)]
        places: dict[str, list[float]] = {"few_steps": list(self.few), "loss_by_sigma": bins, "guidance_by_sigma": bins}
        places["curvature"] = places["one_step"] = sigma_grid(self.steps, model.grid_shift)[:-1].tolist()
        return places | {key: list(self.cfgs) for key in RESPONSES}


def evaluate_candidate(
    candidate: Candidate, settings: EvalSettings, results: Path | None = None, *, held_out_only: bool = False
) -> EvalResult:
    """Every meter of one ``candidate``, or those of held-out samples only. results: folder where they stay for the next time.

    Raises UserError for a model that does not fit the data, or gives no finite answer.
    """
    opened = cache(candidate.open)

    def fresh(make: Callable[[str, Model, EvalSettings], EvalResult]) -> EvalResult:
        return make(candidate.name, opened(), settings)

    parts = {"held_out": _evaluate_held_out} if held_out_only else {"held_out": _evaluate_held_out, "paths": _evaluate_paths}
    found = []
    for part, make in parts.items():
        file = results and result_file(results, candidate.name, part)
        key = {"weights": candidate.weights, "questions": settings.identity} if results else {}
        found.append(cached_result(file, key, partial(fresh, make)))
    readings = {key: reading for result in found for key, reading in result.readings.items()}
    return EvalResult(readings, found[-1].places, found[-1].image)


def _evaluate_held_out(candidate: str, model: Model, settings: EvalSettings) -> EvalResult:
    batches = settings.batches(model)
    if batches[0].noisy.shape[1] != model.components.sample_shape[0]:
        there, here = batches[0].noisy.shape[1], model.components.sample_shape[0]
        raise UserError(f"the held-out samples have {there} channels, the model's {here}: choose another recipe with --data")
    model.remember([*settings.prompts, model.negative, *(c for b in batches if b.text is None for c in b.captions)])
    found = held_out_meters(model, batches, BINS)
    _check(candidate, found)
    return EvalResult(found, settings.places(model), tuple(model.components.sample_shape))


def _evaluate_paths(candidate: str, model: Model, settings: EvalSettings) -> EvalResult:
    model.remember([*settings.prompts, model.negative])
    noise = start_noise(0, len(settings.prompts), model.components.sample_shape)
    how = Sampling(solver=settings.solver, steps=settings.steps)
    found = path_meters(model, settings.prompts, noise, how, few=settings.few)
    found |= guidance_meters(model, settings.prompts, noise, how, cfgs=settings.cfgs, judge=settings.judge)
    _check(candidate, found)
    found = {key: reading for key, reading in found.items() if reading.bottom.any()}  # no accuracy without digits
    return EvalResult(found, settings.places(model), tuple(model.components.sample_shape))


def _check(candidate: str, found: dict[str, RatioEstimate]) -> None:
    for key, reading in found.items():
        if not np.isfinite(reading.top).all():
            raise UserError(f"{candidate}: {key}: not every sample has a finite number; the weights are broken")
        if key.removeprefix("response_") not in RESPONSES and not reading.bottom.sum(0).all():
            raise UserError(f"{candidate}: {key}: paths have no length; the model predicts velocities of 0. Was it trained?")


def measure(
    candidates: list[Candidate],
    settings: EvalSettings,
    *,
    reference: str | None,
    title: str,
    results: Path | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """All candidates, and how each differs from ``reference`` (default the first), sample by sample.

    Returns title, settings, reference, meters, and by candidate and meter a list of {"at", "value", "low", "high"} with
    "difference", "difference_low", "difference_high" and a "verdict" beside the reference: what distillation.json holds.
    results: folder where they stay for the next time. Raises UserError for what cannot be compared.
    """
    names = [c.name for c in candidates]
    reference = reference or names[0]
    check_comparable(names, reference, settings)
    readings: dict[str, dict[str, RatioEstimate]] = {}
    places: dict[str, dict[str, list[float]]] = {}
    shapes: dict[tuple[int, ...], str] = {}
    for candidate in sorted(candidates, key=lambda c: c.name != reference):
        name, result = candidate.name, evaluate_candidate(_of_one_shape(candidate, shapes), settings, results)
        _check_shape(name, result.image, shapes)
        readings[name], places[name] = result.readings, result.places
        say(f"{name}: " + _short(readings[name]))
    readings, places = {name: readings[name] for name in names}, {name: places[name] for name in names}
    said = {
        "prompts": distinct(settings.prompts, settings.trained),
        "held-out samples": f"{settings.samples}, of {amount(len(readings[reference]['loss'].top), 'image')}",
        "held-out data": settings.recipe.run.name,
        "paths": Sampling(solver=settings.solver, steps=settings.steps).label,
        "intervals": "95 %, bootstrap over images and prompts",
    }
    prompts = len(set(settings.prompts))
    return {
        "title": title,
        "settings": said,
        "distinct_prompts": prompts,
        **compared(readings, places, reference, settings.cfgs),
    }


def compared(
    readings: dict[str, dict[str, RatioEstimate]],
    places: dict[str, dict[str, list[float]]],
    reference: str,
    cfgs: tuple[float, ...],
) -> dict[str, Any]:
    """The candidates of these readings, and how each differs from ``reference``: the part of distillation.json in numbers."""
    names, against = list(readings), readings[reference]
    return {
        "images": len(against["loss"].top),
        "reference": reference,
        "meters": [vars(m) for m in _all_meters(cfgs) if m.key in against],
        "candidates": {
            n: {k: _rows(r, against[k], places[n].get(k), n == reference) for k, r in readings[n].items()} for n in names
        },
    }


def _of_one_shape(candidate: Candidate, shapes: dict[tuple[int, ...], str]) -> Candidate:
    """The candidate, refused as soon as it is open where its images have not the one shape in ``shapes``."""

    def opened() -> Model:
        model = candidate.open()
        _check_shape(candidate.name, tuple(model.components.sample_shape), shapes)
        return model

    return replace(candidate, open=opened)


def _check_shape(name: str, image: tuple[int, ...], shapes: dict[tuple[int, ...], str]) -> None:
    shapes.setdefault(image, name)
    if len(shapes) > 1:
        raise UserError(f"{' and '.join(shapes.values())} make images of different shapes: measure them separately")


def check_comparable(names: list[str], reference: str, settings: EvalSettings, *, prompts: bool = True) -> None:
    """Raise UserError for names that are not each one candidate's, and for too few samples or ``prompts``."""
    if len(set(names)) != len(names):
        raise UserError(f"two candidates share a name: {', '.join(names)}", exit_code=2)
    if reference not in names:
        raise UserError(f"--reference: no candidate '{reference}'; there are {', '.join(names)}", exit_code=2)
    for flag, count, least in (("samples", settings.samples, 2 * BINS), ("prompts", len(settings.prompts), 2)):
        if count < least and (prompts or flag == "samples"):
            raise UserError(f"--{flag}: {count} {'is' if count == 1 else 'are'} too few for intervals; at least {least}", 2)


def _all_meters(cfgs: tuple[float, ...]) -> list[Meter]:
    by_key = {m.key: m for m in METERS}
    scales = f"CFG {cfgs[0]:g} to {cfgs[-1]:g}"
    moves = [
        Meter(f"response_{m.key}", f"{m.label}, {scales}", "Change of: " + m.help[0].lower() + m.help[1:])
        for m in map(by_key.__getitem__, RESPONSES)
    ]
    return [*METERS, *moves]


def _rows(reading: RatioEstimate, reference: RatioEstimate, places: list[float] | None, own: bool) -> list[dict[str, Any]]:
    """A row per place; differences are taken within each bootstrap sample, which both share. Bounds and verdict are None
    where too few units are behind the place."""
    draws, others, units = reading.resampled(), reference.resampled(), reading.units
    low, high = interval(draws, reading)
    rows: list[dict[str, Any]] = [
        {"value": float(v), "low": known_bound(a), "high": known_bound(b), "units": int(n)}
        for v, a, b, n in zip(reading.value, low, high, units)
    ]
    for row, place in zip(rows, places or []):
        row["at"] = place
    if not own:
        low, high = interval(draws - others, reading)
        for row, d, a, b, there in zip(rows, reading.value - reference.value, low, high, reference.value):
            row |= {"difference": float(d), "difference_low": known_bound(a), "difference_high": known_bound(b)}
            row["verdict"] = _verdict(float(d), known_bound(a), known_bound(b), float(there))
    return rows


def known_bound(bound: float) -> float | None:
    """A bound of an interval for JSON; None where there is none."""
    return float(bound) if np.isfinite(bound) else None


def _verdict(difference: float, low: float | None, high: float | None, reference: float) -> str | None:
    if low is None or high is None:
        return None
    if low <= 0 <= high:
        return "no difference seen"
    if abs(difference) < SMALLEST * abs(reference):
        return f"by less than {SMALLEST:.0%}"
    return "higher" if low > 0 else "lower"


def _short(readings: dict[str, RatioEstimate]) -> str:
    return "  ".join(f"{m.label} {readings[m.key].value[0]:.4g}" for m in METERS if m.axis is None)
