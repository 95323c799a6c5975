"""cuDNN's attention where there is no mask: at 4,176 tokens it takes 1.34 ms there and back for flash's 2.43 (H200).

Its backward (torch 2.11) reads the gradient as if it lay in memory as the output does. Where it does not, gradients are wrong
after a loss that is right; so it is seen to that it does.
"""

from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import dedistill.kernels as kernels

CHOICE = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""The first that takes the inputs."""
_torchs = F.scaled_dot_product_attention


class _Strides(Protocol):
    strides: tuple[int, ...]


class AsItLies(torch.autograd.Function):
    """x itself, whose gradient lies in memory as x does."""

    @staticmethod
    def forward(ctx: _Strides, x: Tensor) -> Tensor:
        ctx.strides = x.stride()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: _Strides, grad: Tensor) -> Tensor:
        if grad.stride() == ctx.strides:
            return grad
        return torch.empty_strided(grad.shape, ctx.strides, dtype=grad.dtype, device=grad.device).copy_(grad)


def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **how: Any) -> Tensor:
    """As torch's function of these arguments, by cuDNN where that was proven and there is no mask."""
    if attn_mask is not None or query.dtype == torch.float32 or (query.device, "attention") not in kernels.proven:
        return _torchs(query, key, value, attn_mask, *args, **how)
    with sdpa_kernel(CHOICE, set_priority=True):
        return AsItLies.apply(_torchs(query, key, value, None, *args, **how))


def use(device: torch.device | str) -> str:
    """Have all networks of this process take :func:`attention`; returns whose it is, for plan.json."""
    kernels.prove(device, ("attention",))
    if (torch.empty(0, device=device).device, "attention") not in kernels.proven:
        return "torch"
    F.scaled_dot_product_attention = attention
    return "cudnn"


SHAPES = ((2, 200, 200, 4, 128), (1, 333, 333, 2, 64), (1, 256, 77, 2, 64))
"""Samples, queries, keys, heads, and numbers of each head."""


@torch.enable_grad()
def distance(device: torch.device, backend: SDPBackend = SDPBackend.CUDNN_ATTENTION) -> float:
    """From products and a softmax in float32, the farthest of output and gradients relative to each: with heads that lie after
    tokens and before them, and gradients that lie as the output does, the other way, and in slices of something wider."""
    far = []
    for samples, queries, keys, heads, size in SHAPES:
        draw = partial(_drawn, device, samples, heads, size)
        inputs = [draw(tokens) for tokens in (queries, keys, keys)]
        grads = draw(queries), draw(queries).contiguous(), draw(queries, wide=2)
        for given, grad in product((inputs, [t.contiguous() for t in inputs]), grads):
            exact = _passes([t.float() for t in given], grad.float(), SDPBackend.MATH)
            pairs = zip(_passes(given, grad, backend), exact)
            far += [float((found - wanted).norm() / wanted.norm()) for found, wanted in pairs]
    return max(far)


def _drawn(device: torch.device, samples: int, heads: int, size: int, tokens: int, wide: int = 1) -> Tensor:
    """Random numbers [samples, heads, tokens, size], heads after tokens in memory, of rows ``wide`` times as long."""
    drawn = torch.randn(samples, tokens, wide * heads * size, device=device, dtype=torch.bfloat16)
    return drawn[..., : heads * size].unflatten(2, (heads, size)).transpose(1, 2)


def _passes(inputs: Sequence[Tensor], grad: Tensor, backend: SDPBackend) -> list[Tensor]:
    """Output and gradients of the inputs."""
    query, key, value = inputs = [t.detach().requires_grad_() for t in inputs]
    with sdpa_kernel(backend):
        out = AsItLies.apply(_torchs(query, key, value))
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]
