"""Averages of any width from the two that were tracked."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from dedistill.errors import UserError
from dedistill.posthoc.power import Profile, coefficients, exponent, walk_error
from dedistill.posthoc.snapshots import Snapshot, find_snapshots
from dedistill.posthoc.stream import Average

TRUSTED = 0.01
"""Relative error for a random walk (:func:`power.walk_error`) above which a reconstruction is not to be relied on: real
weights were seen to miss by up to five times as much, because they move most when a run begins (docs/posthoc.md)."""


def profile_folder(sigma_rel: float) -> str:
    """Where, beside the snapshots of the weights, those of the average of this width are."""
    return f"ema_{sigma_rel:g}"


def find_profiles(snapshots: Path, skip: Collection[int] = ()) -> dict[float, list[Snapshot]]:
    """sigma_rel -> snapshots of that average, oldest first. Raises UserError as :func:`find_snapshots`, and without any."""
    found = {}
    for folder in sorted(snapshots.glob("ema_*")):
        try:
            found[float(folder.name.removeprefix("ema_"))] = find_snapshots(folder, skip)
        except ValueError as e:
            raise UserError(f"'{folder}' is not named after the width of an average") from e
    if not found:
        raise UserError(f"'{snapshots}' holds no tracked averages: train with snapshot.ema = [0.05, 0.10], or use --alpha")
    return found


@dataclass(frozen=True)
class Reconstruction:
    """What is to be summed, and how far each sum will be from what it stands for."""

    snapshots: list[Snapshot]
    averages: list[Average]
    errors: list[float]
    """Of each average, :func:`power.walk_error`."""


def reconstruct(profiles: dict[float, list[Snapshot]], widths: Sequence[float], out: Path, step: int | None) -> Reconstruction:
    """One average in folder ``out`` for each of ``widths`` (sigma_rel), as of ``step``, by default the last.

    Snapshots later than ``step`` are not used. Raises UserError for a width that no average has, and a step that is not
    one of the snapshots'.
    """
    steps = sorted({s.step for found in profiles.values() for s in found})
    step = steps[-1] if step is None else step
    if step not in steps:
        raise UserError(f"--step {step}: there are snapshots of steps {', '.join(map(str, steps))}", 2)
    used = [(s, Profile(s.step, exponent(sigma))) for sigma, found in profiles.items() for s in found if s.step <= step]
    used.sort(key=lambda pair: pair[0].step)
    stored = [profile for _, profile in used]
    averages, errors = [], []
    for width in widths:
        target = Profile(step, exponent(width))
        weights = coefficients(stored, target)
        averages.append(Average(out / f"sigma_rel_{width:g}.safetensors", weights, f"power sigma_rel={width:g} step={step}"))
        errors.append(walk_error(weights, stored, target))
    return Reconstruction([s for s, _ in used], averages, errors)
