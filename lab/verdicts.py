"""From the scores of several seeds to differences with intervals, and from those to words."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from lab.tricks import SCORES, TRICKS, Comparison, Trick

LEVEL = 0.95


@dataclass(frozen=True)
class Effect:
    """Mean over seeds of what a score changes by, with its interval; the two values are means as well."""

    value: float
    control: float
    mean: float
    low: float
    high: float

    @property
    def seen(self) -> bool:
        return self.low > 0 or self.high < 0


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and Student's interval of 95 % of a few independent values (Student 1908)."""
    x = np.asarray(values, dtype=np.float64)
    half = stats.t.ppf((1 + LEVEL) / 2, len(x) - 1) * x.std(ddof=1) / len(x) ** 0.5
    return float(x.mean()), float(x.mean() - half), float(x.mean() + half)


def effect(scores: list[dict], run: str, control: str, key: str) -> Effect | None:
    """``run`` less ``control``, seed by seed: both began from the same student. None where a score was not taken."""
    pairs = [(seed[run].get(key), seed[control].get(key)) for seed in scores]
    if any(value is None for pair in pairs for value in pair):
        return None
    ours, theirs = np.array(pairs).T
    return Effect(float(ours.mean()), float(theirs.mean()), *mean_interval(ours - theirs))


def word(found: Effect, key: str) -> str:
    """helps, hurts or no difference seen; for scores where neither end is good, higher or lower."""
    if not found.seen:
        return "no difference seen"
    rises = found.low > 0
    better = SCORES[key].better
    if better is None:
        return "higher" if rises else "lower"
    return "helps" if rises == (better == "high") else "hurts"


def decimals(width: float) -> int:
    """Decimals that show an interval of this width to two digits."""
    return int(np.clip(1 - np.floor(np.log10(max(width, 1e-9))), 1, 5))


def change(found: Effect) -> str:
    """+.012 [+.010, +.014], to the digits that the interval carries."""
    places = decimals(found.high - found.low)
    mean, low, high = (f"{value:+.{places}f}" for value in (found.mean, found.low, found.high))
    return f"{mean} [{low}, {high}]"


def phrase(comparison: Comparison, trick: Trick, scores: list[dict]) -> str:
    """What the primary score says of a comparison, and where others contradict it."""
    found = effect(scores, comparison.run, comparison.control, trick.primary)
    verdict = word(found, trick.primary)
    text = f"{comparison.label} {_verb(verdict)} ({SCORES[trick.primary].label} {change(found)})"
    others = {key: effect(scores, comparison.run, comparison.control, key) for key in trick.others}
    words = {key: word(e, key) for key, e in others.items() if e}
    for against in ("helps", "hurts"):
        contrary = [f"{SCORES[k].label} {change(others[k])}" for k, w in words.items() if w == against != verdict]
        text += f", though it {against} by {', '.join(contrary)}" if contrary else ""
    return text


def _verb(verdict: str) -> str:
    return "shows no difference" if verdict == "no difference seen" else verdict


def sentence(trick: Trick, scores: list[dict]) -> str:
    """The verdict of a trick in one sentence, of its main comparisons."""
    text = "; ".join(phrase(comparison, trick, scores) for comparison in trick.comparisons if comparison.main)
    return text[0].upper() + text[1:] + "."


def count() -> int:
    return sum(len(trick.comparisons) for trick in TRICKS)
