"""From the gradients of a step's micro-batches, on any number of processes, to the gradient of the whole batch."""

import torch
from torch import nn

from dedistill.world import World

RESOLUTION = 2.0**-52
"""Step of the fixed-point numbers: far below the epsilon of AdamW (1e-8); floats above 4e-9 keep all their bits."""
LIMIT = 2.0**11
"""Sums of gradients stay below this in size, or they would not fit 63 bits."""


class SummedGradients:
    """Sums as they come: fast, and equal on any number of processes to rounding."""

    def __init__(self, parameters: list[nn.Parameter], world: World):
        self.parameters, self.world = parameters, world

    def add(self) -> None:
        """Take in the gradients of one micro-batch. They are added up where they are."""

    def finish(self) -> None:
        """Leave the sum over all micro-batches of all ranks in ``.grad``. Once per step, on every rank."""
        for parameter in self.parameters:
            if parameter.grad is None:  # this rank had nothing to do
                parameter.grad = torch.zeros_like(parameter)
        self.world.sum_([p.grad for p in self.parameters])


class ExactGradients:
    """Sums of integers, which come out the same in any order: weights are bit-equal on any number of processes.

    Each sample's gradient is rounded to a multiple of 2^-52 and added as int64. 8 bytes per parameter are kept, and
    travel. A gradient too large for that makes the step's gradient NaN, so that the step is not applied.
    """

    def __init__(self, parameters: list[nn.Parameter], world: World, batch: int):
        """batch: samples per step; each is added alone, its loss divided by ``batch``."""
        self.parameters, self.world, self.limit = parameters, world, LIMIT / batch
        self.sums = [torch.zeros_like(p, dtype=torch.int64) for p in parameters]
        self.refused = torch.zeros((), dtype=torch.int64, device=parameters[0].device)

    def add(self) -> None:
        """Take in the gradients of one sample."""
        used = [(total, p) for total, p in zip(self.sums, self.parameters) if p.grad is not None]
        largest = torch.stack([p.grad.abs().amax().double() for _, p in used])
        fits = (largest < self.limit).all()  # false for NaN, too
        self.refused += ~fits
        for total, parameter in used:
            total += (parameter.grad.double() / RESOLUTION).round_().where(fits, 0.0).long()
            parameter.grad = None

    def finish(self) -> None:
        self.world.sum_([*self.sums, self.refused])
        for total, parameter in zip(self.sums, self.parameters):
            exact = total.double() * RESOLUTION
            parameter.grad = exact.where(self.refused == 0, torch.nan).to(parameter.dtype)
            total.zero_()
        self.refused.zero_()


def gradients_for(parameters: list[nn.Parameter], world: World, batch: int, exact: bool) -> SummedGradients | ExactGradients:
    return ExactGradients(parameters, world, batch) if exact else SummedGradients(parameters, world)
