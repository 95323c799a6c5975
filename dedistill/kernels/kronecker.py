"""The small factor of a LoKr on a GPU, in one kernel each way.

A matrix product with a side of 4 leaves the tensor cores idle and, in bf16, falls back to loads of 4 bytes: at 1,104 tokens of
3,072 numbers it takes .06 ms where reading and writing them takes .005.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dedistill.kernels import Saved

LARGEST = 16
"""Sides of the small factor up to which these kernels are made: their loops are unrolled."""
ROWS, COLUMNS = 8, 256


class AddMixed(torch.autograd.Function):
    """base [..., p, q] + first [p, a] times groups [..., a, q], each product rounded to bf16 before it is added."""

    @staticmethod
    def forward(ctx: Saved, base: Tensor, first: Tensor, groups: Tensor) -> Tensor:
        ctx.save_for_backward(first, groups)
        return mixed(first, groups, base.contiguous())

    @staticmethod
    def backward(ctx: Saved, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first, groups = ctx.saved_tensors
        grad = grad.contiguous()
        rows, (p, a), q = grad.numel() // (grad.shape[-1] * grad.shape[-2]), first.shape, grad.shape[-1]
        grid = (triton.cdiv(rows, ROWS), triton.cdiv(q, COLUMNS))
        parts = torch.empty(*grid, p, a, device=grad.device, dtype=torch.float32)
        of_groups = torch.empty_like(groups)
        _backward[grid](grad, first, groups, of_groups, parts, rows, q, P=p, A=a, ROWS=ROWS, COLUMNS=COLUMNS)
        return grad, parts.sum((0, 1)).to(first.dtype), of_groups


class FusedMixed(AddMixed):
    """The same in what a compiler makes a kernel of: there, a part of what comes after; back, by the kernel here, since of sums
    over all tokens it would make slow ones."""

    @staticmethod
    def forward(ctx: Saved, base: Tensor, first: Tensor, groups: Tensor) -> Tensor:
        ctx.save_for_backward(first, groups)
        return base + (first[:, :, None].float() * groups.unsqueeze(-3).float()).sum(-2).to(base.dtype)


def mixed(first: Tensor, groups: Tensor, base: Tensor) -> Tensor:
    """base + first times groups; all contiguous."""
    out = torch.empty_like(base)
    (p, a), q = first.shape, groups.shape[-1]
    rows = groups.numel() // (a * q)
    _forward[(rows, triton.cdiv(q, 2 * COLUMNS))](base, first, groups, out, q, P=p, A=a, COLUMNS=2 * COLUMNS)
    return out


@torch.enable_grad()
def distance(device: torch.device) -> float:
    """From the same in float64, the farthest of result and gradients relative to each."""
    draw = lambda *shape: torch.randn(shape, device=device).to(torch.bfloat16).requires_grad_()  # noqa: E731
    inputs, above = (draw(2, 19, 4, 300), draw(4, 4), draw(2, 19, 4, 300)), draw(2, 19, 4, 300).detach()
    exact = [t.detach().double().requires_grad_() for t in inputs]
    out, truth = AddMixed.apply(*inputs), exact[0] + exact[1] @ exact[2]
    found = (out, *torch.autograd.grad(out, inputs, above))
    wanted = (truth, *torch.autograd.grad(truth, exact, above.double()))
    return max(float((a - b).detach().norm() / b.detach().norm()) for a, b in zip(found, wanted))


@triton.jit
def _forward(base, first, groups, out, q, P: tl.constexpr, A: tl.constexpr, COLUMNS: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = at < q
    for p in tl.static_range(P):
        total = tl.zeros((COLUMNS,), tl.float32)
        for a in tl.static_range(A):
            group = tl.load(groups + (row * A + a) * q + at, inside).to(tl.float32)
            total += tl.load(first + p * A + a).to(tl.float32) * group
        place = (row * P + p) * q + at
        rounded = total.to(out.dtype.element_ty).to(tl.float32)
        tl.store(out + place, tl.load(base + place, inside).to(tl.float32) + rounded, inside)


@triton.jit
def _backward(
    grad, first, groups, of_groups, parts, rows, q, P: tl.constexpr, A: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    # each program leaves its own sum for the small factor: atomics would add in any order
    part = parts + (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * P * A
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    at = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < rows) & (at < q)
    for p in tl.static_range(P):
        above = tl.load(grad + (row * P + p) * q + at, inside, other=0).to(tl.float32)
        for a in tl.static_range(A):
            group = tl.load(groups + (row * A + a) * q + at, inside, other=0).to(tl.float32)
            tl.store(part + p * A + a, tl.sum(tl.sum(above * group, 1), 0))
    for a in tl.static_range(A):
        below = tl.zeros((ROWS, COLUMNS), tl.float32)
        for p in tl.static_range(P):
            above = tl.load(grad + (row * P + p) * q + at, inside, other=0).to(tl.float32)
            below += tl.load(first + p * A + a).to(tl.float32) * above
        tl.store(of_groups + (row * A + a) * q + at, below, inside)
