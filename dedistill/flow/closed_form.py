"""Rectified flow on labelled Gaussian mixtures, where the best velocity, guidance, paths and loss are known exactly.

Data of component k is N(mean_k, deviation_k^2) in each dimension, noise N(0, 1), noisy = (1 - sigma) data + sigma noise. A
model trained without end would be this velocity; what samples, meters or trains models is checked against it.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dedistill.flow.guidance import classifier_free
from dedistill.flow.path import expand

NODES = 80
"""Points per dimension of the quadrature in :meth:`Mixture.loss_floor`."""


@dataclass(frozen=True)
class Mixture:
    """Components that belong to labels. All float64 on the CPU."""

    means: Tensor
    """[K, D]"""
    deviations: Tensor
    """[K], positive; the same in every dimension."""
    shares: Tensor
    """[K], of all data; they add up to 1."""
    labels: Tensor
    """[K], integers: the label (caption) that a component's data bears."""

    def __post_init__(self):
        count = len(self.means)
        if self.means.ndim != 2 or any(t.shape != (count,) for t in (self.deviations, self.shares, self.labels)):
            raise ValueError("means are [K, D]; deviations, shares and labels are [K]")
        if not (self.deviations > 0).all() or not (self.shares > 0).all() or abs(float(self.shares.sum()) - 1) > 1e-9:
            raise ValueError("deviations and shares are positive, and shares add up to 1")

    def of(self, label: int | None) -> "Mixture":
        """The data of one label; all of it for None. Raises ValueError for a label that no component has."""
        if label is None:
            return self
        own = self.labels == label
        if not own.any():
            raise ValueError(f"no component has the label {label}")
        shares = self.shares[own] / self.shares[own].sum()
        return Mixture(self.means[own], self.deviations[own], shares, self.labels[own])

    def sample(self, rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
        """(data [count, D], labels [count])."""
        which = torch.from_numpy(rng.choice(len(self.means), count, p=self.shares.numpy()))
        spread = torch.from_numpy(rng.standard_normal((count, self.means.shape[1])))
        return self.means[which] + self.deviations[which, None] * spread, self.labels[which]

    def variances(self, sigma: Tensor) -> Tensor:
        """Of a noisy number, per component: (1 - sigma)^2 deviation^2 + sigma^2, [B, K]."""
        return ((1 - sigma)[:, None] * self.deviations) ** 2 + sigma[:, None] ** 2

    def posterior(self, noisy: Tensor, sigma: Tensor) -> Tensor:
        """How likely each component is behind ``noisy`` [B, D] at ``sigma`` [B]: [B, K]."""
        variance, offset = self.variances(sigma), self._offset(noisy, sigma)
        log = self.shares.log() - offset.square().sum(2) / (2 * variance) - noisy.shape[1] / 2 * variance.log()
        return torch.softmax(log, 1)

    def velocities(self, noisy: Tensor, sigma: Tensor) -> Tensor:
        """E[noise - data | noisy, component], [B, K, D]."""
        slope = (sigma[:, None] - (1 - sigma)[:, None] * self.deviations**2) / self.variances(sigma)
        return slope[:, :, None] * self._offset(noisy, sigma) - self.means

    def velocity(self, noisy: Tensor, sigma: Tensor, label: int | None = None) -> Tensor:
        """E[noise - data | noisy, label] of ``noisy`` [B, D] at ``sigma`` [B]; label None: of all data, without condition."""
        own = self.of(label)
        return (own.posterior(noisy, sigma)[:, :, None] * own.velocities(noisy, sigma)).sum(1)

    def guided(self, noisy: Tensor, sigma: Tensor, label: int, cfg: float) -> Tensor:
        """The field that classifier-free guidance follows: v + cfg (v_label - v), with v that of all data."""
        return classifier_free(self.velocity(noisy, sigma, label), self.velocity(noisy, sigma), cfg)

    def loss_floor(self, sigma: float, label: int | None = None) -> float:
        """The least flow-matching loss at ``sigma``, mean over elements: E[(noise - data - velocity)^2].

        Within a component it is deviation^2 / variance. Between components it is an integral, by Gauss and Hermite's rule:
        D at most 2, unless the label has one component. Raises ValueError otherwise.
        """
        own, at = self.of(label), torch.tensor([sigma], dtype=torch.float64)
        within = float((own.shares * own.deviations**2 / own.variances(at)[0]).sum())
        if len(own.means) == 1:
            return within
        size = own.means.shape[1]
        if size > 2:
            raise ValueError(f"the loss floor of several components is integrated in 1 or 2 dimensions, not {size}")
        nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)
        grid = torch.tensor(list(itertools.product(nodes, repeat=size)))
        weight = torch.tensor([math.prod(w) for w in itertools.product(weights, repeat=size)])
        weight = weight / weight.sum()
        between = 0.0
        for k, (share, variance) in enumerate(zip(own.shares, own.variances(at)[0])):
            noisy = (1 - sigma) * own.means[k] + variance.sqrt() * grid
            times = at.expand(len(noisy))
            gap = own.velocities(noisy, times)[:, k] - own.velocity(noisy, times)
            between += float(share * (weight * gap.square().mean(1)).sum())
        return within + between

    def _offset(self, noisy: Tensor, sigma: Tensor) -> Tensor:
        """noisy - (1 - sigma) mean, [B, K, D]."""
        return noisy[:, None] - expand(1 - sigma, noisy)[:, None] * self.means


def gaussian_path(mean: Tensor, deviation: float, noise: Tensor, sigma: float) -> Tensor:
    """Where the exact flow of a single Gaussian takes ``noise`` [B, D] by ``sigma``: (1 - sigma) mean + sqrt(variance) noise.

    Guidance between two Gaussians of one deviation is the flow of the Gaussian at mean_all + cfg (mean_label - mean_all).
    """
    return (1 - sigma) * mean + math.hypot((1 - sigma) * deviation, sigma) * noise


def gaussian_straightness(deviation: float) -> float:
    """Mean square, over path, noise and elements, of velocity minus (noise - end): deviation (2 - pi / 2).

    0 is straight: one Euler step ends where many do (Liu et al. 2022, arXiv 2209.03003, eq. 7).
    """
    return deviation * (2 - math.pi / 2)


def gaussian_mean_floor(deviation: float) -> float:
    """The least flow-matching loss of a single Gaussian under uniform sigma, mean over elements: deviation pi / 2."""
    return deviation * math.pi / 2
