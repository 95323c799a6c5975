"""How distilled a model is, in numbers of single samples: what few steps lose, how curved paths are, what guidance does.

Every meter is a ratio of two sums over samples, so that one bootstrap serves them all and candidates that were asked
the same questions are compared pair by pair. CFG is 1 unless a meter is about CFG.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dedistill.evaluation.influence import angular_distance
from dedistill.evaluation.judges import DigitJudge
from dedistill.evaluation.numbers import image_numbers
from dedistill.flow import keyed
from dedistill.flow.guidance import ClassifierFree
from dedistill.flow.solvers import sigma_grid
from dedistill.models.model import Model
from dedistill.sampling.sampler import Sampling, sample, trajectories

RESAMPLES = 1000
LEVEL = 0.95
GUIDED = ("saturated", "contrast", "blur", "shadow")
"""Numbers of images that are followed over CFG."""


@dataclass(frozen=True)
class RatioEstimate:
    """A meter at M places (solver steps, bins of sigma, CFG scales): top and bottom [N, M]; its value is sum / sum [M].

    strata [N]: samples are resampled within equal numbers only; None: all alike.
    """

    top: np.ndarray
    bottom: np.ndarray
    strata: np.ndarray | None = None

    @property
    def value(self) -> np.ndarray:
        return ratio(np.ones((1, len(self.top))), self)[0]

    def resampled(self) -> np.ndarray:
        """[1000, M] values of bootstrap samples; the same samples for every reading of as many."""
        return ratio(resamples(len(self.top), self.strata), self)


def ratio(weights: np.ndarray, reading: RatioEstimate) -> np.ndarray:
    """weights [R, N] -> values [R, M]; NaN where the bottom is 0."""
    top, bottom = weights @ reading.top, weights @ reading.bottom
    return np.divide(top, bottom, out=np.full_like(top, np.nan), where=bottom != 0)


def resamples(count: int, strata: np.ndarray | None = None) -> np.ndarray:
    """How often each sample is drawn [1000, count] when as many are drawn with replacement, stratum by stratum."""
    strata = np.zeros(count, dtype=int) if strata is None else strata
    weights = np.zeros((RESAMPLES, count))
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        rng = keyed.generator(0, "bootstrap", int(stratum))
        weights[:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), RESAMPLES)
    return weights


def interval(resampled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Percentile interval of 95 % [M], [M] (Efron & Tibshirani 1993, ch. 13)."""
    tail = 50 * (1 - LEVEL)
    low, high = np.nanpercentile(resampled, [tail, 100 - tail], axis=0)
    return low, high


def path_meters(
    model: Model, prompts: list[str], noise: Tensor, *, steps: int, few: tuple[int, ...]
) -> dict[str, RatioEstimate]:
    """Meters of the paths from noise [N, C, h, w] at CFG 1, in ``steps`` Euler steps and in fewer.

    straightness: int |chord - velocity|^2 dsigma over |chord|^2, with chord = noise - end (arXiv 2209.03003, S over its
    scale), 0 for straight paths; curvature: the same per solver step. turning_angle: degrees by which the velocity turns
    from noise to data. few_steps: |end - end in few steps|^2 over |chord|^2.
    """
    sigmas = sigma_grid(steps, model.grid_shift)
    paths = [path_numbers(states, sigmas) for states in trajectories(model, prompts, noise, Sampling(steps=steps))]
    chord, curvature, angle, ends = (np.concatenate(part) for part in zip(*paths))
    gaps = []
    for n in few:
        short = torch.cat([s[-1] for s in trajectories(model, prompts, noise, Sampling(steps=n))])
        gaps.append(((short.flatten(1).double().numpy() - ends) ** 2).mean(1))
    one = chord[:, None]
    return {
        "straightness": RatioEstimate((curvature * -np.diff(sigmas)).sum(1, keepdims=True), one),
        "curvature": RatioEstimate(curvature, np.repeat(one, steps, 1)),
        "turning_angle": RatioEstimate(angle[:, None], np.ones_like(one)),
        "few_steps": RatioEstimate(np.stack(gaps, 1), np.repeat(one, len(few), 1)),
    }


def path_numbers(states: list[Tensor], sigmas: np.ndarray) -> tuple[np.ndarray, ...]:
    """Of each path: |chord|^2 [B] and |chord - velocity|^2 of each step [B, S] per element, turning angle [B], end [B, D]."""
    z = torch.stack(states, 1).flatten(2).double()
    velocity = z.diff(dim=1) / torch.from_numpy(np.diff(sigmas))[:, None]
    chord = z[:, :1] - z[:, -1:]
    angle = 180 * angular_distance(velocity[:, :-1], velocity[:, 1:]).sum(1)
    curvature = (chord - velocity).square().mean(2)
    return chord.square().mean(2)[:, 0].numpy(), curvature.numpy(), angle.numpy(), z[:, -1].numpy()


def guidance_meters(
    model: Model, prompts: list[str], noise: Tensor, *, steps: int, cfgs: tuple[float, ...], judge: DigitJudge | None
) -> dict[str, RatioEstimate]:
    """Numbers of the images at each scale of ``cfgs``: those of ``GUIDED``, and with a judge correct and realistic."""
    columns = []
    for cfg in cfgs:
        images = sample(model, prompts, noise, Sampling(steps=steps, guidance=ClassifierFree(cfg)))
        numbers = {key: value for key, value in image_numbers(images).items() if key in GUIDED}
        if judge:
            numbers |= {"correct": judge.correct(images, prompts), "realistic": judge.realistic(images)}
        columns.append(numbers)
    stacked = {key: np.stack([numbers[key] for numbers in columns], 1) for key in columns[0]}
    return {key: RatioEstimate(np.nan_to_num(top), np.isfinite(top).astype(float)) for key, top in stacked.items()}


def response(reading: RatioEstimate) -> RatioEstimate:
    """How far a number moves from the first place to the last, over samples that have it at both."""
    both = reading.bottom[:, :1] * reading.bottom[:, -1:]
    return RatioEstimate((reading.top[:, -1:] - reading.top[:, :1]) * both, both)
