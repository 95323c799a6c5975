"""Rectified flow of labelled Gaussian mixtures in closed form: truth to check solvers, guidance and meters against.

All in float64. A noisy sample (1 - sigma) data + sigma noise of one Gaussian component is Gaussian again, with mean
(1 - sigma) mu and variance (1 - sigma)^2 s^2 + sigma^2 in each dimension, so the velocity E[noise - data | noisy] of a
mixture is the components' linear velocities weighed by their posterior probabilities.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy import integrate
from torch import Tensor

from dedistill.flow import keyed

REACH, POINTS = 9.0, {1: 2001, 2: 181}
"""The trapezoidal rule over +-9 deviations of a component: for these smooth integrands it converges exponentially."""


@dataclass(frozen=True)
class Mixture:
    """weights [K] > 0 adding up to 1, means [K, D], stds [K, D] > 0, labels [K]; several components may share a label."""

    weights: Tensor
    means: Tensor
    stds: Tensor
    labels: Tensor

    @classmethod
    def of(cls, weights: list[float], means: list[list[float]], stds: list[list[float]], labels: list[int]) -> "Mixture":
        """From plain numbers; raises ValueError for those that are not a mixture."""
        w, m, s = (torch.tensor(x, dtype=torch.float64) for x in (weights, means, stds))
        if m.ndim != 2 or m.shape != s.shape or w.shape != m.shape[:1] or len(labels) != len(w):
            raise ValueError(f"weights {tuple(w.shape)}, means {tuple(m.shape)}, stds {tuple(s.shape)}, {len(labels)} labels")
        if not ((w > 0).all() and (s > 0).all() and math.isclose(float(w.sum()), 1)):
            raise ValueError("weights must be positive and add up to 1, stds positive")
        return cls(w, m, s, torch.tensor(labels))

    def given(self, label: int) -> "Mixture":
        """The data of one label."""
        own = self.labels == label
        if not own.any():
            raise ValueError(f"no component has label {label}")
        return Mixture(self.weights[own] / self.weights[own].sum(), self.means[own], self.stds[own], self.labels[own])

    def draw(self, seed: int, count: int) -> tuple[Tensor, Tensor]:
        """data [count, D] and its labels [count]."""
        rng = keyed.generator(seed, "closed-form/data")
        k = torch.from_numpy(rng.choice(len(self.weights), count, p=self.weights.numpy()))
        normal = torch.from_numpy(rng.standard_normal((count, self.means.shape[1])))
        return self.means[k] + self.stds[k] * normal, self.labels[k]

    def log_density(self, noisy: Tensor, sigma: float | Tensor) -> Tensor:
        """log p_sigma of noisy [B, D]: [B]. sigma: one for all, or [B]."""
        return torch.logsumexp(self._log_joint(noisy, sigma), 1)

    def velocity(self, noisy: Tensor, sigma: float | Tensor) -> Tensor:
        """E[noise - data | noisy], [B, D]: the minimiser of the flow-matching loss. sigma: one for all, or [B]."""
        s = _column(sigma)
        slope = (s - (1 - s) * self.stds**2) / self._variance(sigma)
        each = -self.means + slope * (noisy[:, None] - (1 - s) * self.means)
        return (self._log_joint(noisy, sigma).softmax(1)[..., None] * each).sum(1)

    def guided(self, noisy: Tensor, sigma: float | Tensor, label: int, cfg: float) -> Tensor:
        """The CFG field: the velocity given ``label``, steered away from that without a label, [B, D]."""
        without = self.velocity(noisy, sigma)
        return without + cfg * (self.given(label).velocity(noisy, sigma) - without)

    def transport(self, noise: Tensor, sigma: float = 0.0) -> Tensor:
        """Where the exact ODE takes noise [B, D] by ``sigma``. One component, or one dimension.

        A Gaussian's ODE is linear. In one dimension paths cannot cross, so a sample keeps its quantile.
        """
        if len(self.weights) == 1:
            return (1 - sigma) * self.means + self._deviation(sigma) * noise
        if self.means.shape[1] != 1:
            raise ValueError("several components in several dimensions have no transport in closed form")
        return self._quantile(torch.special.log_ndtr(noise), torch.special.log_ndtr(-noise), sigma)

    def floor(self, sigma: float) -> float:
        """The least flow-matching loss at ``sigma``, as a mean over dimensions: E Var(noise - data | noisy).

        One component: the mean of s^2 / ((1 - sigma)^2 s^2 + sigma^2). Else E|noise - data|^2 - E|velocity|^2.
        """
        if len(self.weights) == 1:
            return float((self.stds**2 / self._deviation(sigma) ** 2).mean())
        target = (self.weights[:, None] * (1 + self.stds**2 + self.means**2)).sum(0).mean()
        return float(target) - self.expect(sigma, lambda x: self.velocity(x, sigma).square().mean(1))

    def expect(self, sigma: float, f: Callable[[Tensor], Tensor]) -> float:
        """E f(noisy) at ``sigma`` for f: [B, D] -> [B], by quadrature; D is 1 or 2."""
        dims = self.means.shape[1]
        if dims not in POINTS:
            raise ValueError(f"quadrature in {dims} dimensions; 1 or 2 are possible")
        axis = torch.linspace(-REACH, REACH, POINTS[dims], dtype=torch.float64)
        z = torch.cartesian_prod(*[axis] * dims).reshape(-1, dims)
        mass = torch.exp(-z.square().sum(1) / 2) * ((axis[1] - axis[0]) / math.sqrt(2 * math.pi)) ** dims
        parts = zip(self.weights, self.means, self._deviation(sigma))
        return float(sum(w * (mass * f((1 - sigma) * mean + std * z)).sum() for w, mean, std in parts))

    def _variance(self, sigma: float | Tensor) -> Tensor:
        """[1 or B, K, D]"""
        s = _column(sigma)
        return (1 - s) ** 2 * self.stds**2 + s**2

    def _deviation(self, sigma: float) -> Tensor:
        """[K, D]"""
        return self._variance(sigma)[0].sqrt()

    def _log_joint(self, noisy: Tensor, sigma: float | Tensor) -> Tensor:
        """log(weight_k p_k(noisy)), [B, K]."""
        variance = self._variance(sigma)
        square = (noisy[:, None] - (1 - _column(sigma)) * self.means) ** 2 / variance + torch.log(2 * math.pi * variance)
        return self.weights.log() - square.sum(2) / 2

    def _quantile(self, log_below: Tensor, log_above: Tensor, sigma: float) -> Tensor:
        """The x [B, 1] with that log probability below and above it, by bisection; the smaller tail decides."""
        mean, std = (1 - sigma) * self.means[:, 0], self._deviation(sigma)[:, 0]
        low = torch.full_like(log_below, float((mean - 40 * std).min()))
        high = torch.full_like(log_below, float((mean + 40 * std).max()))
        for _ in range(80):  # 2^-80 of the range is below float64's spacing
            middle = (low + high) / 2
            z = (middle - mean) / std
            below = torch.logsumexp(self.weights.log() + torch.special.log_ndtr(z), 1, keepdim=True)
            above = torch.logsumexp(self.weights.log() + torch.special.log_ndtr(-z), 1, keepdim=True)
            left = torch.where(log_below < log_above, below < log_below, above > log_above)
            low, high = torch.where(left, middle, low), torch.where(left, high, middle)
        return (low + high) / 2


def _column(sigma: float | Tensor) -> Tensor:
    """sigma as [1, 1, 1], or [B, 1, 1]."""
    return torch.as_tensor(sigma, dtype=torch.float64).reshape(-1, 1, 1)


def straightness(mixture: Mixture, points: int = 4001) -> float:
    """E int |chord - velocity|^2 dsigma / E|chord|^2 of one component's exact trajectories, chord = noise - data.

    With a(sigma) the deviation at sigma, velocity = -mu + a'(sigma) noise and chord = -mu + (1 - s) noise.
    """
    if len(mixture.weights) != 1:
        raise ValueError("straightness in closed form needs a single component")
    s, mean = mixture.stds[0].numpy(), mixture.means[0].numpy()
    sigma = np.linspace(0, 1, points)[:, None]
    slope = (sigma - (1 - sigma) * s**2) / np.sqrt((1 - sigma) ** 2 * s**2 + sigma**2)
    curvature = np.trapezoid((slope - (1 - s)) ** 2, sigma, axis=0)
    return float(curvature.mean() / (mean**2 + (1 - s) ** 2).mean())


def mean_straightness(mixture: Mixture, nodes: int = 60) -> float:
    """The same of any mixture in one dimension, over all noise, without following a path.

    int velocity dsigma along a path is its chord, so the integral is int E|velocity|^2 dsigma - E|chord|^2: the first is what
    the densities alone say, the second what the quantiles do.
    """
    x, w = np.polynomial.legendre.leggauss(nodes)
    sigmas = (1 + x) / 2
    square = w / 2 @ [mixture.expect(s, lambda z, s=s: mixture.velocity(z, s).square().mean(1)) for s in sigmas]
    noise = Mixture.of([1.0], [[0.0]], [[1.0]], [0])
    chord = noise.expect(1.0, lambda e: (e - mixture.transport(e)).square().mean(1))
    return float(square / chord - 1)


def exact_paths(field: Callable[[Tensor, float], Tensor], noise: Tensor, sigmas: np.ndarray) -> tuple[Tensor, Tensor]:
    """States [S, B, D] of the ODE from noise [B, D] at falling ``sigmas`` from 1 on, and int |velocity|^2 dsigma from 0 to 1
    [B], a mean over dimensions: to ten digits, by an eighth-order Runge-Kutta."""

    def slope(sigma: float, y: np.ndarray) -> np.ndarray:
        v = field(torch.from_numpy(y[: noise.numel()]).reshape(noise.shape), sigma)
        return np.concatenate([v.numpy().ravel(), -v.square().mean(1).numpy()])

    start = np.concatenate([noise.numpy().ravel(), np.zeros(len(noise))])
    found = integrate.solve_ivp(slope, (1, 0), start, method="DOP853", t_eval=sigmas, rtol=1e-11, atol=1e-11)
    states = torch.from_numpy(found.y[: noise.numel()].T.copy()).reshape(len(sigmas), *noise.shape)
    return states, torch.from_numpy(found.y[noise.numel() :, -1].copy())
