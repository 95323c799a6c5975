"""Products of int8 with int8 numbers in the place of those of weights made of codes: faster on cards, and coarser.

Each token of the input is quantized by a scale of its own, as each row of the weight is. For the gradient of the input the
weight's scales go into the gradient that comes, before that is quantized: the same codes serve both passes.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dedistill.kernels as kernels
from dedistill.errors import UserError

QMAX = 127
LEAST_ROWS, MULTIPLE = 32, 8
"""What torch's own product on a card takes: more than 16 rows, and sides that are multiples of 8."""


class Int8Products(torch.autograd.Function):
    """x [..., in], codes [out, in], scale [out, 1], bias [out] or None -> [..., out] in x's dtype."""

    @staticmethod
    def forward(ctx: kernels.Saved, x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(codes, scale)
        tokens, steps = quantize_tokens(x.reshape(-1, x.shape[-1]))
        out = scaled_product(tokens, codes.t(), steps, scale.flatten().float(), bias, x.dtype)
        return out.view(*x.shape[:-1], len(codes))

    @staticmethod
    def backward(ctx: kernels.Saved, grad: Tensor) -> tuple[Tensor, None, None, None]:
        codes, scale = ctx.saved_tensors
        tokens, steps = quantize_tokens(grad.reshape(-1, grad.shape[-1]), scale.flatten().float())
        out = scaled_product(tokens, codes, steps, None, None, grad.dtype)
        return out.view(*grad.shape[:-1], codes.shape[1]), None, None, None


def quantize_tokens(x: Tensor, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """int8 codes [m, n] and float32 scale [m, 1] of x [m, n] times factor [n]; the largest number of a row becomes 127.
    Where one is not finite, neither is the row's scale."""
    # compiled, it is a part of what comes before, and done once for all layers of the same input
    if (x.device, "products") in kernels.proven and not torch.compiler.is_compiling():
        from dedistill.kernels.products import WIDEST, quantized

        if x.shape[1] <= WIDEST:
            return quantized(x.contiguous(), factor)
    value = x.float() if factor is None else x.float() * factor
    scale = value.abs().amax(1, keepdim=True) / QMAX
    return torch.round(value / torch.where(scale == 0, 1, scale)).to(torch.int8), scale


def scaled_product(
    a: Tensor, b: Tensor, rows: Tensor, columns: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """a [m, k] times b [k, n], int8, times rows [m, 1] and columns [n], plus bias [n]: in float32, then in ``dtype``."""
    if (a.device, "products") in kernels.proven:
        from dedistill.kernels.products import scaled

        return scaled(a, b, rows, columns, bias, dtype)
    enough = F.pad(a, (0, 0, 0, max(0, LEAST_ROWS - len(a))))
    out = torch._int_mm(enough, b)[: len(a)].float() * rows
    out = out if columns is None else out * columns
    return (out if bias is None else out + bias.float()).to(dtype)


def fits(linear: nn.Linear) -> bool:
    """Whether torch can multiply its codes on a card."""
    return linear.in_features % MULTIPLE == 0 == linear.out_features % MULTIPLE


def check_products(device: torch.device | str, where: str) -> None:
    """Raises UserError, naming ``where``, on a device that cannot multiply int8."""
    codes = torch.zeros(LEAST_ROWS, LEAST_ROWS, dtype=torch.int8, device=device)
    one = torch.ones(LEAST_ROWS, 1, device=device)
    try:
        for b in (codes, codes.t()):
            scaled_product(codes, b, one, None, None, torch.float32)
    except (RuntimeError, NotImplementedError) as e:
        why = " ".join(str(e).split())[:200]
        raise UserError(f"{where}: products of int8 do not work on {device} ({why}); use 'float'", exit_code=2) from e
