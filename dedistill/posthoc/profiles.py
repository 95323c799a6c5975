"""Averages of snapshots by profile: LERP chains, power laws, and any width from the two that were tracked.

alpha is the weight of the *new* checkpoint, so alpha = .9 is nine tenths the last snapshot. A chain is a fixed linear
combination of its inputs.

The average of width s at time t is theta(t) = integral of tau^gamma theta dtau / integral of tau^gamma dtau over [0, t], with
s = sigma_rel, the profile's standard deviation over t. It is tracked by theta <- beta theta + (1 - beta) weights. Two of
them, stored now and then, give every other one by least squares between profiles (Karras et al. 2024, arXiv 2312.02696,
section 3 and appendix C). Times are in steps; only their ratios matter.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dedistill.errors import UserError
from dedistill.posthoc.snapshots import Average, Snapshot, find_snapshots

# --- the LERP chain of LibreFLUX -------------------------------------------------------------------------------------


ALPHAS = (0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.975, 0.99, 0.995, 0.999)
"""The ten of the LibreFLUX model card."""


def chain_weights(alpha: float, count: int) -> np.ndarray:
    """Weight of each of ``count`` checkpoints, oldest first, float64: (1-a)^(n-1), a(1-a)^(n-2), ..., a. They add up to 1."""
    if not 0 < alpha <= 1:
        raise UserError(f"alpha = {alpha}: the weight of the newer checkpoint lies in (0, 1]", exit_code=2)
    age = np.arange(count - 1, -1, -1, dtype=np.float64)
    weights = alpha * (1 - alpha) ** age
    weights[0] = (1 - alpha) ** (count - 1)
    return weights


class Spread(NamedTuple):
    """What the weights of an average amount to."""

    effective: float
    """Effective sample size, 1 / sum of w^2."""
    age: float
    """Mean age in steps behind the last snapshot."""
    sigma_rel: float
    """Standard deviation of the steps under the weights, over the last step; comparable with a power-law average's."""


def describe(weights: np.ndarray, steps: Sequence[int]) -> Spread:
    """``weights`` of the snapshots at ``steps``, oldest first."""
    ages = steps[-1] - np.asarray(steps, dtype=np.float64)
    mean = float((weights * ages).sum())
    spread = max(float((weights * (ages - mean) ** 2).sum()), 0.0) ** 0.5
    return Spread(float(1 / np.square(weights).sum()), mean, spread / steps[-1])


def output_name(alpha: float) -> str:
    return f"alpha_linear_{alpha:g}.safetensors"


def chain_averages(alphas: Sequence[float], count: int, out: Path) -> list[Average]:
    """One average in folder ``out`` for each of ``alphas``, over ``count`` snapshots."""
    return [Average(out / output_name(a), chain_weights(a, count), f"lerp alpha={a:g}") for a in alphas]


# --- averages with a power-law profile, and any other such average from stored ones ----------------------------------


WIDEST = 12**-0.5
"""sigma_rel of the plain mean over [0, t]; a power-law profile is narrower than that."""


class Profile(NamedTuple):
    """The weights that an average at ``time`` gives to the times before it: proportional to tau^gamma up to ``time``."""

    time: float
    gamma: float


def exponent(sigma_rel: float) -> float:
    """gamma of width ``sigma_rel``: the largest real root of g^3 + 7 g^2 + (16 - s^-2) g + (12 - s^-2).

    Raises UserError outside (0, 12^-1/2), where no positive exponent has that width.
    """
    if not 0 < sigma_rel < WIDEST:
        raise UserError(f"sigma_rel = {sigma_rel:g}: the width of a power-law average lies between 0 and {WIDEST:.4f}", 2)
    inverse = sigma_rel**-2
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
    return float(roots[np.isreal(roots)].real.max())


def width(gamma: float) -> float:
    """sigma_rel of exponent ``gamma``; the inverse of :func:`exponent`."""
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


def share_of_new(gamma: float, before: float, now: float) -> float:
    """1 - beta for an update at time ``now`` after one at ``before``: 1 - (before / now)^(gamma + 1), exact when close to 0."""
    return -math.expm1((gamma + 1) * math.log(before / now)) if before > 0 else 1.0


def coefficients(stored: Sequence[Profile], target: Profile) -> np.ndarray:
    """Weight of each stored average, float64, adding up to 1: their sum is closest to ``target`` (integrated square).

    Raises ValueError for a stored profile later than the target's time: it holds weights that the target must not.
    """
    if any(p.time > target.time for p in stored):
        raise ValueError("a stored average is later than the target")
    between = np.array([[_overlap(a, b) for b in stored] for a in stored])
    found = np.linalg.lstsq(between, np.array([_overlap(a, target) for a in stored]), rcond=None)[0]
    return found / found.sum()


def _overlap(a: Profile, b: Profile) -> float:
    """Integral of the product of two profiles."""
    a, b = sorted((a, b))
    sides = (a.gamma + 1) * (b.gamma + 1) / (a.gamma + b.gamma + 1)
    return sides * (a.time / b.time) ** b.gamma / b.time


def walk_error(weights: np.ndarray, stored: Sequence[Profile], target: Profile) -> float:
    """How far the weighted sum would be from the target if the weights did a random walk, relative to how far the target
    itself is from the last weights.

    A walk's average misses by the integral of (cumulative profile) d walk, so what counts is the integrated square of the
    difference of cumulative profiles; ``weights`` add up to 1.
    """
    profiles, signed = [*stored, target], np.append(weights, -1.0)
    joint = np.array([[_joint(a, b, target.time) for b in profiles] for a in profiles])
    return math.sqrt(max(float(signed @ joint @ signed), 0.0) / (target.time / (2 * target.gamma + 3)))


def _joint(a: Profile, b: Profile, end: float) -> float:
    """Integral over [0, end] of the product of two cumulative profiles, min(1, tau / time)^(gamma + 1)."""
    a, b = sorted((a, b))
    p, q = a.gamma + 1, b.gamma + 1
    ratio = (a.time / b.time) ** q
    return a.time * ratio / (p + q + 1) + (b.time - a.time * ratio) / (q + 1) + end - b.time


# --- averages of any width from the two that were tracked ------------------------------------------------------------


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
