"""Products of int8 matrices with their scales on a GPU: one kernel that quantizes rows, one that multiplies.

torch's own product wants one of both transposed in memory: a seventh of the rate otherwise (130 against 817 TOPS on an H100).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS, DEPTH = 128, 128, 64
WIDEST = 65536
"""Numbers of a row that one program can hold."""


def quantized(x: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor]:
    """int8 codes [m, n] and float32 scale [m, 1] of x [m, n], contiguous, times factor [n], or 1 without."""
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(len(x), 1, dtype=torch.float32, device=x.device)
    n = x.shape[1]
    _quantize[(len(x),)](x, x if factor is None else factor, codes, scale, n, factor is not None, triton.next_power_of_2(n))
    return codes, scale


def scaled(a: Tensor, b: Tensor, rows: Tensor, columns: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """a [m, k] times b [k, n], int8 in any layout, times rows [m, 1] and columns [n], plus bias [n]: float32, rounded once."""
    (m, k), n = a.shape, b.shape[1]
    out = torch.empty(m, n, dtype=dtype, device=a.device)
    grid = (triton.cdiv(m, ROWS), triton.cdiv(n, COLUMNS))
    strides = (*a.stride(), *b.stride())
    given = (rows if columns is None else columns, rows if bias is None else bias)
    kinds = (columns is not None, bias is not None)
    _product[grid](a, b, rows, *given, out, m, n, *strides, k, *kinds, ROWS, COLUMNS, DEPTH, num_warps=8)
    return out


def distance(device: torch.device) -> float:
    """From the same in float64: rounding beyond half a step, and products of both layouts relative to each."""
    x = torch.randn(67, 160, device=device).to(torch.bfloat16)
    factor, bias = torch.rand(160, device=device), torch.randn(96, device=device).to(torch.bfloat16)
    codes, scale = quantized(x, factor)
    exact = x.double() * factor
    steps = float(((codes * scale - exact).abs() / scale).max())
    far = [0.0 if steps < 0.51 else steps]  # rounding is off by half a step at most
    other = torch.randint(-128, 128, (96, 160), dtype=torch.int8, device=device)
    columns = torch.rand(96, device=device)
    for b in (other.t(), other.t().contiguous()):
        truth = (codes.double() @ b.double()) * scale * columns + bias
        far.append(float((scaled(codes, b, scale, columns, bias, torch.bfloat16) - truth).norm() / truth.norm()))
    return max(far)


@triton.jit
def _quantize(x, factor, codes, scale, n, FACTOR: tl.constexpr, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = at < n
    value = tl.load(x + row * n + at, inside, other=0).to(tl.float32)
    if FACTOR:
        value *= tl.load(factor + at, inside, other=0)
    # of numbers that are not finite the sum is none either: a maximum may leave them out
    step = tl.max(tl.abs(value), 0) / 127 + tl.sum(value * 0.0, 0)
    tl.store(scale + row, step)
    value = tl.div_rn(value, tl.where(step == 0, 1.0, step) + tl.zeros((BLOCK,), tl.float32))
    rounded = (value + 12582912.0) - 12582912.0  # 1.5 * 2^23: what is added to it loses its fraction, half to even
    tl.store(codes + row * n + at, rounded.to(tl.int8), inside)


@triton.jit
def _product(
    a,
    b,
    rows,
    columns,
    bias,
    out,
    m,
    n,
    a_row,
    a_column,
    b_row,
    b_column,
    K: tl.constexpr,
    SCALED: tl.constexpr,
    BIASED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.int32)
    for start in range(0, K, DEPTH):
        along = start + tl.arange(0, DEPTH)
        left = tl.load(a + row * a_row + along[None, :] * a_column, (row < m) & (along[None, :] < K), other=0)
        right = tl.load(b + along[:, None] * b_row + column * b_column, (along[:, None] < K) & (column < n), other=0)
        total = tl.dot(left, right, total, out_dtype=tl.int32)
    value = total.to(tl.float32) * tl.load(rows + row, row < m, other=0)
    if SCALED:
        value *= tl.load(columns + column, column < n, other=0)
    if BIASED:
        value += tl.load(bias + column, column < n, other=0).to(tl.float32)
    tl.store(out + row * n + column, value, (row < m) & (column < n))
