"""Products of codes with codes in the place of those with weights made of codes: faster on cards, and coarser.

Each token of the input is quantized by a scale of its own, as each row of the weight is. For the gradient of the input the
weight's scales go into the gradient that comes, before that is quantized: the same codes serve both passes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dedistill.kernels as kernels
from dedistill.errors import UserError


@dataclass(frozen=True)
class Format:
    """What numbers are rounded to, once they are divided by a scale."""

    codes: torch.dtype
    largest: float
    """What the number of a row that is furthest from zero becomes."""
    stored: torch.dtype
    """What parameters hold the bits of codes as."""
    multiple: int
    """Sides of a weight that torch's own product on a card takes."""


INT8 = Format(torch.int8, 127, torch.int8, 8)
FP8 = Format(torch.float8_e4m3fn, 448, torch.uint8, 16)
"""For gradients as well: they have a scale for each token, and need the fraction more than e5m2's range (docs/LOG.md). Its bits
are stored as integers, since gloo does not send it, and it would count as a float."""
FORMATS = {"int8": INT8, "fp8": FP8}
"""By the names that recipes use."""
FORMAT_OF = {format.stored: format for format in FORMATS.values()}
"""By the type of a stored weight."""
LEAST_ROWS = 32
"""torch's product of int8 on a card takes more than 16 rows."""


def encoded(value: Tensor, format: Format) -> Tensor:
    """``value``, which a scale has brought in reach, as codes."""
    if format.codes.is_floating_point:
        return value.clamp(-format.largest, format.largest).to(format.codes)
    return torch.round(value).clamp(-format.largest - 1, format.largest).to(format.codes)


class CodeProducts(torch.autograd.Function):
    """x [..., in], stored weight [out, in], scale [out, 1], bias [out] or None -> [..., out] in x's dtype."""

    @staticmethod
    def forward(ctx: kernels.Saved, x: Tensor, stored: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(stored, scale)
        format = FORMAT_OF[stored.dtype]
        tokens, steps = quantize_tokens(x.reshape(-1, x.shape[-1]), None, format)
        codes = stored.view(format.codes)
        out = scaled_product(tokens, codes.t(), steps, scale.flatten().float(), bias, x.dtype)
        return out.view(*x.shape[:-1], len(codes))

    @staticmethod
    def backward(ctx: kernels.Saved, grad: Tensor) -> tuple[Tensor, None, None, None]:
        stored, scale = ctx.saved_tensors
        format = FORMAT_OF[stored.dtype]
        tokens, steps = quantize_tokens(grad.reshape(-1, grad.shape[-1]), scale.flatten().float(), format)
        out = scaled_product(tokens, stored.view(format.codes), steps, None, None, grad.dtype)
        return out.view(*grad.shape[:-1], stored.shape[1]), None, None, None


def quantize_tokens(x: Tensor, factor: Tensor | None = None, format: Format = INT8) -> tuple[Tensor, Tensor]:
    """Codes [m, n] and float32 scale [m, 1] of x [m, n] times factor [n]. Where a number is not finite, neither is the row's
    scale."""
    # compiled, it is a part of what comes before, and done once for all layers of the same input
    if (x.device, "products") in kernels.proven and not torch.compiler.is_compiling():
        from dedistill.kernels.products import WIDEST, quantized

        if x.shape[1] <= WIDEST:
            return quantized(x.contiguous(), factor, format.codes, format.largest)
    value = x.float() if factor is None else x.float() * factor
    scale = value.abs().amax(1, keepdim=True) / format.largest
    return encoded(value / torch.where(scale == 0, 1, scale), format), scale


def scaled_product(
    a: Tensor, b: Tensor, rows: Tensor, columns: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Codes a [m, k] times b [k, n], times rows [m, 1] and columns [n], plus bias [n]: in float32, then in ``dtype``."""
    if a.dtype == FP8.codes:
        return _scaled_fp8(a, b, rows, columns, bias, dtype)
    if (a.device, "products") in kernels.proven:
        from dedistill.kernels.products import scaled

        return scaled(a, b, rows, columns, bias, dtype)
    enough = F.pad(a, (0, 0, 0, max(0, LEAST_ROWS - len(a))))
    out = torch._int_mm(enough, b)[: len(a)].float() * rows
    out = out if columns is None else out * columns
    return (out if bias is None else out + bias.float()).to(dtype)


def _scaled_fp8(a: Tensor, b: Tensor, rows: Tensor, columns: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    if a.device.type != "cpu" and b.stride(0) != 1:  # cards take what is summed side by side, and nothing else
        b = _turned(b).t()
    columns = rows.new_ones(b.shape[1]) if columns is None else columns
    bias = None if bias is None else bias.to(dtype)
    return torch._scaled_mm(a, b, rows, columns[None], bias=bias, out_dtype=dtype)


def _turned(codes: Tensor) -> Tensor:
    """codes [k, n] as [n, k], contiguous."""
    if (codes.device, "products") in kernels.proven:
        from dedistill.kernels.products import transposed

        return transposed(codes.view(torch.int8)).view(codes.dtype)
    return codes.t().contiguous()


def fits(linear: nn.Linear) -> bool:
    """Whether torch can multiply its codes on a card."""
    multiple = FORMAT_OF[linear.weight.dtype].multiple
    return linear.in_features % multiple == 0 == linear.out_features % multiple


def check_products(device: torch.device | str, where: str, format: Format, dtype: torch.dtype) -> None:
    """Raises UserError, naming ``where``, on a device that cannot multiply codes and give ``dtype``."""
    device = torch.empty(0, device=device).device
    name = next(name for name, one in FORMATS.items() if one is format)
    if why := _why_not(device, format, dtype):
        raise UserError(f"{where}: products of {name} do not work on {device} ({why}); use 'float'", exit_code=2)


def _why_not(device: torch.device, format: Format, dtype: torch.dtype) -> str:
    if format is FP8 and not kernels.has_fp8(device):
        return "cards have fp8 from compute capability 8.9 on: RTX 40, L40S, H100"
    codes = torch.zeros(LEAST_ROWS, LEAST_ROWS, device=device).to(format.codes)
    one = torch.ones(LEAST_ROWS, 1, device=device)
    try:
        for b, columns in ((codes, None), (codes.t(), one.flatten())):
            scaled_product(codes, b, one, columns, columns, dtype)
    except (RuntimeError, NotImplementedError, ValueError) as e:
        return " ".join(str(e).split())[:200]
    return ""
