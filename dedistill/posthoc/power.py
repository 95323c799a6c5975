"""Averages with a power-law profile, and any other such average from stored ones.

The average of width s at time t is theta(t) = integral of tau^gamma theta dtau / integral of tau^gamma dtau over [0, t], with
s = sigma_rel, the profile's standard deviation over t. It is tracked by theta <- beta theta + (1 - beta) weights. Two of
them, stored now and then, give every other one by least squares between profiles (Karras et al. 2024, arXiv 2312.02696,
section 3 and appendix C). Times are in steps; only their ratios matter.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dedistill.errors import UserError

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
