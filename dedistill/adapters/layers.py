"""What an adapter adds to a layer: LyCORIS' parameters, names and files, and a forward of our own.

LyCORIS transposes twice and copies around a product of all tokens with a factor of 4 x 4. Here each product is one kernel,
in what the base gives. The delta is never added to the weight: (W + dW) in the base's dtype rounds small deltas away.
"""

import torch
from lycoris.modules.locon import LoConModule
from lycoris.modules.lokr import LokrModule
from torch import Tensor
from torch.nn import functional as F

import dedistill.kernels as kernels


class LoraLayer(LoConModule):
    """y = W x + up down x."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] in a type that the base takes -> [..., out] in the base's."""
        base = self.org_forward(x)
        down, up = (w.to(base.dtype) for w in (self.lora_down.weight, self.lora_up.weight))
        delta = F.linear(F.linear(x.to(base.dtype), down), up)
        scale = self.scale * self.multiplier
        return base + delta if scale == 1 else base + scale * delta


class LokrLayer(LokrModule):
    """y = W x + (w1 (x) w2) x, of w1 [p, a] and w2 [q, b]: x is taken as a groups of b numbers. w2 may be w2_a w2_b."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., a b] in a type that the base takes -> [..., p q] in the base's."""
        base = self.org_forward(x)
        w1 = self.lokr_w1 if self.use_w1 else self.lokr_w1_a @ self.lokr_w1_b
        groups = x.to(base.dtype).unflatten(-1, (w1.shape[1], -1))
        for factor in [self.lokr_w2] if self.use_w2 else [self.lokr_w2_b, self.lokr_w2_a]:
            groups = F.linear(groups, factor.to(base.dtype))
        if (scale := self.scale * self.multiplier) != 1:
            w1 = w1 * scale
        return add_mixed(base.unflatten(-1, (w1.shape[0], -1)), w1.to(base.dtype), groups).flatten(-2)


class LoraConv(LoConModule):
    """y = W * x + up * (down * x), up a convolution of one pixel."""

    def forward(self, x: Tensor) -> Tensor:
        """x [B, in, H, W] in a type that the base takes -> [B, out, H', W'] in the base's."""
        base = self.org_forward(x)
        down, up = (w.to(base.dtype) for w in (self.lora_down.weight, self.lora_up.weight))
        delta = F.conv2d(F.conv2d(x.to(base.dtype), down, **self.kw_dict), up)
        scale = self.scale * self.multiplier
        return base + delta if scale == 1 else base + scale * delta


class LokrConv(LokrModule):
    """y = W * x + (w1 (x) w2) * x, of w1 [p, a] and w2 [q, b, h, w]: x is taken as a groups of b channels. w2 may be
    w2_a [q, r] times w2_b [r, b h w]."""

    def forward(self, x: Tensor) -> Tensor:
        """x [B, a b, H, W] in a type that the base takes -> [B, p q, H', W'] in the base's."""
        base = self.org_forward(x)
        w1 = self.lokr_w1 if self.use_w1 else self.lokr_w1_a @ self.lokr_w1_b
        groups = x.to(base.dtype).unflatten(1, (w1.shape[1], -1)).flatten(0, 1)
        if self.use_w2:
            groups = F.conv2d(groups, self.lokr_w2.to(base.dtype), **self.kw_dict)
        else:
            window = self.lokr_w2_b.to(base.dtype).unflatten(1, (-1, *self.shape[2:]))
            groups = F.conv2d(F.conv2d(groups, window, **self.kw_dict), self.lokr_w2_a.to(base.dtype)[..., None, None])
        if (scale := self.scale * self.multiplier) != 1:
            w1 = w1 * scale
        return base + torch.matmul(w1.to(base.dtype), groups.reshape(len(x), w1.shape[1], -1)).view_as(base)


def add_mixed(base: Tensor, first: Tensor, groups: Tensor) -> Tensor:
    """base [..., p, q] + first [p, a] times groups [..., a, q]."""
    if base.dtype == torch.bfloat16 and (base.device, "kronecker") in kernels.proven:
        from dedistill.kernels import kronecker

        if max(first.shape) <= kronecker.LARGEST:
            mixing = kronecker.FusedMixed if torch.compiler.is_compiling() else kronecker.AddMixed
            return mixing.apply(base, first, groups)
    return base + torch.matmul(first.expand(*groups.shape[:-2], *first.shape), groups)
