"""What an adapter adds to a linear: LyCORIS' parameters, names and files, and a forward of our own.

LyCORIS transposes twice and copies around a product of all tokens with a factor of 4 x 4. Here each product is one kernel,
in what the base gives. The delta is never added to the weight: (W + dW) in the base's dtype rounds small deltas away.
"""

import torch
from lycoris.modules.locon import LoConModule
from lycoris.modules.lokr import LokrModule
from torch import Tensor
from torch.nn import functional as F


class LoraLayer(LoConModule):
    """y = W x + up down x."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] in any float type -> [..., out] in the base's."""
        base = self.org_forward(x)
        down, up = (w.to(base.dtype) for w in (self.lora_down.weight, self.lora_up.weight))
        return _add(base, F.linear(F.linear(x.to(base.dtype), down), up), self.scale * self.multiplier)


class LokrLayer(LokrModule):
    """y = W x + (w1 (x) w2) x, of w1 [p, a] and w2 [q, b]: x is taken as a groups of b numbers. w2 may be w2_a w2_b."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., a b] in any float type -> [..., p q] in the base's."""
        base = self.org_forward(x)
        w1 = self.lokr_w1 if self.use_w1 else self.lokr_w1_a @ self.lokr_w1_b
        second = [self.lokr_w2] if self.use_w2 else [self.lokr_w2_b, self.lokr_w2_a]
        delta = kronecker(x.to(base.dtype), w1.to(base.dtype), [w.to(base.dtype) for w in second])
        return _add(base, delta, self.scale * self.multiplier)


def kronecker(x: Tensor, first: Tensor, second: list[Tensor]) -> Tensor:
    """(first (x) second) x without the large matrix: x [..., a b], first [p, a]; second: factors of [q, b], the last one first."""
    groups = x.unflatten(-1, (first.shape[1], -1))
    for factor in second:
        groups = F.linear(groups, factor)
    return mixed(first, groups).flatten(-2)


def mixed(first: Tensor, groups: Tensor) -> Tensor:
    """first [p, a] times groups [..., a, q]: [..., p, q]."""
    return torch.matmul(first.expand(*groups.shape[:-2], *first.shape), groups)


def _add(base: Tensor, delta: Tensor, scale: float) -> Tensor:
    return base + delta if scale == 1 else base + scale * delta
