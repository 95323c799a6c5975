"""How distilled a model is, in numbers of single samples: what few steps lose, how curved paths are, what guidance does.

Every meter is a ratio of two sums over images or prompts, so that one bootstrap serves them all and candidates that were
asked the same questions are compared pair by pair. CFG is 1 unless a meter is about CFG.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.stats import norm, t
from torch import Tensor

from dedistill.data.split import LEAST_UNITS
from dedistill.evaluation.influence import angular_distance
from dedistill.evaluation.judges import DigitJudge
from dedistill.evaluation.numbers import image_numbers
from dedistill.flow import keyed
from dedistill.flow.guidance import ClassifierFree
from dedistill.flow.solvers import sigma_grid
from dedistill.models.model import Model
from dedistill.sampling.sampler import Sampling, sample, trajectories

RESAMPLES = 4000
LEVEL = 0.95
GUIDED = ("saturated", "contrast", "blur", "shadow")
"""Numbers of images that are followed over CFG."""


@dataclass(frozen=True)
class RatioEstimate:
    """A meter at M places (solver steps, bins of sigma, CFG scales): top and bottom [U, M]; its value is sum / sum [M].

    A row is what one unit adds: an image with all that was drawn of it, or a prompt. Only units are independent of one
    another; many draws of few images are no more evidence than the images are.
    """

    top: np.ndarray
    bottom: np.ndarray
    wider: float = 1.0
    """What bootstrap values are taken apart by, where units are not quite independent (``folds.joined``)."""

    @classmethod
    def of(cls, top: np.ndarray, bottom: np.ndarray, units: Sequence[str], sigmas: np.ndarray | None = None) -> "RatioEstimate":
        """Of samples [N, M], of which those with equal ``units`` [N] belong together.

        sigmas [N]: where they were chosen beforehand. How the numbers depend on them is then no uncertainty.
        """
        if sigmas is not None:
            top = _without_trend(top, bottom, sigmas)
        _, place = np.unique(np.asarray(units), return_inverse=True)
        sums = np.zeros((2, place.max() + 1, top.shape[1]))
        np.add.at(sums[0], place, top)
        np.add.at(sums[1], place, bottom)
        return cls(*sums)

    @property
    def value(self) -> np.ndarray:
        return ratio(np.ones((1, len(self.top))), self)[0]

    @property
    def units(self) -> np.ndarray:
        """How many units each place stands on [M]."""
        return (self.bottom != 0).sum(0)

    @property
    def equal_units(self) -> np.ndarray:
        """How many units of equal weight would tell as much [M]: fewer, where some were drawn often and some once."""
        squares = (self.bottom**2).sum(0)
        return self.bottom.sum(0) ** 2 / np.where(squares == 0, 1, squares)

    def resampled(self) -> np.ndarray:
        """[4000, M] values of bootstrap samples; the same units for every reading of as many."""
        found = ratio(resamples(len(self.top)), self)
        return found if self.wider == 1 else self.value + self.wider * (found - self.value)


def _without_trend(top: np.ndarray, bottom: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
    """Numerators [N, M] of the same sum, without what a cubic in sigma explains of them.

    A regression takes away little of what images differ by; means of small strata would take it along, and make intervals
    too narrow where there are few images (tests/evaluation/test_meters.py).
    """
    count, total = len(sigmas), bottom.sum(0)
    value = top.sum(0) / np.where(total == 0, 1, total)
    degree = min(3, count // 8)
    basis, _ = np.linalg.qr(np.polynomial.legendre.legvander(2 * sigmas - 1, degree))
    rest = top - value * bottom
    rest -= basis @ (basis.T @ rest)
    return value * bottom + rest * math.sqrt(max(1, count - 1) / max(1, count - 1 - degree))


def ratio(weights: np.ndarray, reading: RatioEstimate) -> np.ndarray:
    """weights [R, U] -> values [R, M]; NaN where the bottom is 0."""
    top, bottom = weights @ reading.top, weights @ reading.bottom
    return np.divide(top, bottom, out=np.full_like(top, np.nan), where=bottom != 0)


def resamples(count: int) -> np.ndarray:
    """How often each unit is drawn [4000, count] when as many are drawn with replacement."""
    return keyed.generator(0, "bootstrap", 0).multinomial(count, np.full(count, 1 / count), RESAMPLES).astype(float)


def interval(resampled: np.ndarray, reading: RatioEstimate) -> tuple[np.ndarray, np.ndarray]:
    """Interval of 95 % [M], [M] of bootstrap values [4000, M] of a ``reading``, or of its difference to another one.

    Percentiles (Efron & Tibshirani 1993, ch. 13), taken further out for few units, by as much as Student's t lies outside
    the normal and the spread of few is too small (Hesterberg 2015, Am. Stat. 69, sec. 3.3). NaN for fewer than
    ``LEAST_UNITS``: then even these are wrong.
    """
    low, high = np.full(resampled.shape[1], np.nan), np.full(resampled.shape[1], np.nan)
    for i, (units, equal) in enumerate(zip(reading.units, reading.equal_units)):
        if units >= LEAST_UNITS:
            tail = 100 * norm.cdf(np.sqrt(equal / (equal - 1)) * t.ppf((1 - LEVEL) / 2, equal - 1))
            low[i], high[i] = np.nanpercentile(resampled[:, i], [tail, 100 - tail])
    return low, high


def path_meters(
    model: Model, prompts: list[str], noise: Tensor, how: Sampling, *, few: tuple[int, ...]
) -> dict[str, RatioEstimate]:
    """Meters of the paths from noise [N, C, h, w] that ``how`` makes, which is to be without guidance, and in fewer steps.

    straightness: int |chord - velocity|^2 dsigma over |chord|^2, with chord = noise - end (arXiv 2209.03003, S over its
    scale), 0 for straight paths, with the mean velocity of each step; curvature: the same per step. turning_angle: degrees
    by which the velocity turns from noise to data. few_steps: |end - end in few steps|^2 over |chord|^2. one_step: the same of
    a single Euler step from each state of the path, where its velocity points, to the end.
    """
    sigmas = sigma_grid(how.steps, model.grid_shift)
    made = [(*path_numbers(s, sigmas), one_step_errors(s, sigmas)) for s in trajectories(model, prompts, noise, how)]
    chord, curvature, angle, ends, errors = (np.concatenate(part) for part in zip(*made))
    gaps = []
    for n in few:
        short = torch.cat([s[-1] for s in trajectories(model, prompts, noise, replace(how, steps=n))])
        gaps.append(((short.flatten(1).double().numpy() - ends) ** 2).mean(1))
    one = chord[:, None]
    pairs = {
        "straightness": ((curvature * -np.diff(sigmas)).sum(1, keepdims=True), one),
        "curvature": (curvature, np.repeat(one, how.steps, 1)),
        "one_step": (errors, np.repeat(one, how.steps, 1)),
        "turning_angle": (angle[:, None], np.ones_like(one)),
        "few_steps": (np.stack(gaps, 1), np.repeat(one, len(few), 1)),
    }
    return {key: RatioEstimate.of(top, bottom, prompts) for key, (top, bottom) in pairs.items()}


def path_numbers(states: list[Tensor], sigmas: np.ndarray) -> tuple[np.ndarray, ...]:
    """Of each path: |chord|^2 [B] and |chord - velocity|^2 of each step [B, S] per element, turning angle [B], end [B, D]."""
    z = torch.stack(states, 1).flatten(2).double()
    velocity = z.diff(dim=1) / torch.from_numpy(np.diff(sigmas))[:, None]
    chord = z[:, :1] - z[:, -1:]
    angle = 180 * angular_distance(velocity[:, :-1], velocity[:, 1:]).sum(1)
    curvature = (chord - velocity).square().mean(2)
    return chord.square().mean(2)[:, 0].numpy(), curvature.numpy(), angle.numpy(), z[:, -1].numpy()


def one_step_errors(states: list[Tensor], sigmas: np.ndarray) -> np.ndarray:
    """|state - sigma velocity - end|^2 per element of each state of a path but the last, [B, S], by the mean velocity of each
    step: what a single Euler step from there misses the path's own end by."""
    z, s = torch.stack(states, 1).flatten(2).double(), torch.from_numpy(sigmas)[:, None]
    reached = z[:, :-1] - s[:-1] * z.diff(dim=1) / s.diff(dim=0)
    return (reached - z[:, -1:]).square().mean(2).numpy()


def guidance_meters(
    model: Model, prompts: list[str], noise: Tensor, how: Sampling, *, cfgs: tuple[float, ...], judge: DigitJudge | None
) -> dict[str, RatioEstimate]:
    """Numbers of the images made like ``how``, but at each scale of ``cfgs``: those of ``GUIDED``, and with a judge correct and
    realistic."""
    columns = []
    for cfg in cfgs:
        images = sample(model, prompts, noise, replace(how, guidance=ClassifierFree(cfg)))
        numbers = {key: value for key, value in image_numbers(images).items() if key in GUIDED}
        if judge:
            numbers |= {"correct": judge.correct(images, prompts), "realistic": judge.realistic(images)}
        columns.append(numbers)
    stacked = {key: np.stack([numbers[key] for numbers in columns], 1) for key in columns[0]}
    found = {key: (np.nan_to_num(top), np.isfinite(top).astype(float)) for key, top in stacked.items()}
    readings = {key: RatioEstimate.of(top, there, prompts) for key, (top, there) in found.items()}
    if len(cfgs) > 1:
        readings |= {f"response_{key}": RatioEstimate.of(*response(*pair), prompts) for key, pair in found.items()}
    return readings


def response(top: np.ndarray, there: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far a number moves from the first place to the last, of samples [N, M] that have it (``there``) at both."""
    both = there[:, :1] * there[:, -1:]
    return (top[:, -1:] - top[:, :1]) * both, both
