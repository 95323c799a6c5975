"""Captions of handwritten digits: several templates, words or numerals, and noise as captions from the web have it."""

import re

import numpy as np

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
NUMERALS = [str(d) for d in range(10)]
TEMPLATES = {
    1: ["{}", "the digit {}", "a handwritten {}", "the number {} written by hand"],
    2: [
        "{} {}",
        "{} then {}",
        "handwritten {} and {}",
        "the digit {} and the digit {}",
        "a handwritten {} then a {}",
    ],
}


def uniforms_needed(digits: int) -> int:
    return 1 + 3 * digits


def caption(digits: np.ndarray, u: np.ndarray, noise: float) -> str:
    """A caption of ``digits`` from uniforms u [1 + 3 n].

    Each digit is replaced, with probability ``noise``, by one drawn from all ten (so a tenth of those are right).
    """
    templates = TEMPLATES[len(digits)]
    words = []
    for digit, (wrong, which, form) in zip(digits, u[1:].reshape(-1, 3)):
        said = int(which * 10) if wrong < noise else int(digit)
        words.append(WORDS[said] if form < 0.5 else NUMERALS[said])
    return templates[int(u[0] * len(templates))].format(*words)


def digits_in(text: str) -> list[int]:
    """The digits a caption names, in order."""
    value = {w: d for d, w in enumerate(WORDS)} | {n: d for d, n in enumerate(NUMERALS)}
    return [value[w] for w in re.findall(r"\w+", text.lower()) if w in value]
