"""Weights from codes on a GPU: 3 bytes per number move. torch's own kernel for mixed types reads them one by one."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dedistill.kernels import has_fp8

BLOCK = 4096


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """codes [out, in], int8 or fp8, times scale [out, 1], in its dtype, with the bits of torch's product; both contiguous."""
    out = torch.empty(codes.shape, dtype=scale.dtype, device=codes.device)
    _dequantize[(triton.cdiv(codes.numel(), BLOCK),)](codes, scale, out, codes.numel(), codes.shape[1], BLOCK=BLOCK)
    return out


def distance(device: torch.device) -> float:
    """From torch's product, relative to it."""
    codes = torch.randint(-128, 128, (96, 160), dtype=torch.int8, device=device)
    scale = torch.rand(96, 1, device=device).to(torch.bfloat16)
    far = []
    for kind in (codes, codes.clamp(-126, 126).view(torch.float8_e4m3fn))[: 1 + has_fp8(device)]:
        truth = kind.double() * scale
        far.append(float((dequantize(kind, scale) - truth).norm() / truth.norm()))
    return max(far)


@triton.jit
def _dequantize(codes, scale, out, numel, columns, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    factor = tl.load(scale + at // columns, inside).to(tl.float32)
    tl.store(out + at, tl.load(codes + at, inside).to(tl.float32) * factor, inside)
