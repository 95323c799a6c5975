"""Products of codes with their scales on a GPU: kernels that quantize rows and transpose, and one that multiplies int8.

Tensor cores want the numbers that are summed side by side in both factors. Otherwise a product runs at a fifth of the
rate (H200: 190 against 1,000 TOPS), torch's as well, so that transposing the second factor first costs less.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dedistill.kernels import has_fp8

ROWS, COLUMNS, DEPTH = 128, 128, 128
"""The fastest of eight tiles at widths of 3,072 to 15,360 on an H200 (benchmarks.gpu_products)."""
SIDE = 64
WIDEST = 65536
"""Numbers of a row that one program can hold."""


def quantized(x: Tensor, factor: Tensor | None, dtype: torch.dtype, largest: float) -> tuple[Tensor, Tensor]:
    """Codes [m, n] of ``dtype`` up to ``largest`` and float32 scale [m, 1] of x [m, n], contiguous, times factor [n], or 1
    without."""
    codes = torch.empty(x.shape, dtype=dtype, device=x.device)
    scale = torch.empty(len(x), 1, dtype=torch.float32, device=x.device)
    n, block = x.shape[1], triton.next_power_of_2(x.shape[1])
    # 32 numbers a thread, as far as there are threads: more do not fit its registers
    warps = min(16, max(4, block // 1024))
    given = (x, x if factor is None else factor, codes, scale, n, largest)
    _quantize[(len(x),)](*given, factor is not None, dtype == torch.int8, block, num_warps=warps)
    return codes, scale


def scaled(a: Tensor, b: Tensor, rows: Tensor, columns: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """a [m, k], contiguous, times b [k, n], int8, times rows [m, 1] and columns [n], plus bias [n]: float32, rounded once."""
    (m, k), n = a.shape, b.shape[1]
    other = b.t() if b.stride(0) == 1 else transposed(b)
    out = torch.empty(m, n, dtype=dtype, device=a.device)
    grid = (triton.cdiv(m, ROWS), triton.cdiv(n, COLUMNS))
    given = (rows if columns is None else columns, rows if bias is None else bias)
    kinds = (columns is not None, bias is not None)
    _product[grid](a, other, rows, *given, out, m, n, other.stride(0), k, *kinds, ROWS, COLUMNS, DEPTH, num_warps=8)
    return out


def transposed(matrix: Tensor) -> Tensor:
    """[n, k], contiguous, of an int8 matrix [k, n] whose rows are contiguous."""
    rows, columns = matrix.shape
    out = torch.empty(columns, rows, dtype=matrix.dtype, device=matrix.device)
    grid = (triton.cdiv(rows, SIDE), triton.cdiv(columns, SIDE))
    _transpose[grid](matrix, out, rows, columns, matrix.stride(0), SIDE)
    return out


def distance(device: torch.device) -> float:
    """From the same in float64: rounding beyond half a step, and products of both layouts relative to each."""
    x = torch.randn(67, 160, device=device).to(torch.bfloat16)
    factor, bias = torch.rand(160, device=device), torch.randn(96, device=device).to(torch.bfloat16)
    exact = x.double() * factor
    far = []
    if has_fp8(device):
        codes, scale = quantized(x, factor, torch.float8_e4m3fn, 448)
        by = ((codes.double() * scale - exact).abs() / (exact.abs() + scale / 64)).max()
        far.append(0.0 if by < 1 / 15 else float(by))  # a number in 16 at most, and of the smallest half a step of 2^-9
    codes, scale = quantized(x, factor, torch.int8, 127)
    steps = float(((codes * scale - exact).abs() / scale).max())
    far.append(0.0 if steps < 0.51 else steps)  # rounding is off by half a step at most
    other = torch.randint(-128, 128, (96, 160), dtype=torch.int8, device=device)
    columns = torch.rand(96, device=device)
    for b in (other.t(), other.t().contiguous()):
        truth = (codes.double() @ b.double()) * scale * columns + bias
        far.append(float((scaled(codes, b, scale, columns, bias, torch.bfloat16) - truth).norm() / truth.norm()))
    return max(far)


@triton.jit
def _quantize(x, factor, codes, scale, n, largest, FACTOR: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = at < n
    value = tl.load(x + row * n + at, inside, other=0).to(tl.float32)
    if FACTOR:
        value *= tl.load(factor + at, inside, other=0)
    # of numbers that are not finite the sum is none either: a maximum may leave them out
    step = tl.max(tl.abs(value), 0) / largest + tl.sum(value * 0.0, 0)
    tl.store(scale + row, step)
    value = tl.div_rn(value, tl.where(step == 0, 1.0, step) + tl.zeros((BLOCK,), tl.float32))
    if WHOLE:
        value = (value + 12582912.0) - 12582912.0  # 1.5 * 2^23: what is added to it loses its fraction, half to even
    tl.store(codes + row * n + at, value.to(codes.dtype.element_ty), inside)


@triton.jit
def _transpose(matrix, out, rows, columns, stride, SIDE: tl.constexpr):
    row = (tl.program_id(0) * SIDE + tl.arange(0, SIDE)).to(tl.int64)
    column = (tl.program_id(1) * SIDE + tl.arange(0, SIDE)).to(tl.int64)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tile = tl.load(matrix + row[:, None] * stride + column[None, :], inside, other=0)
    inside = (column < columns)[:, None] & (row < rows)[None, :]
    tl.store(out + column[:, None] * rows + row[None, :], tl.trans(tile), inside)


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
    stride,
    K: tl.constexpr,
    SCALED: tl.constexpr,
    BIASED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """b: [n, k], its rows ``stride`` apart."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.int32)
    for start in range(0, K, DEPTH):
        along = start + tl.arange(0, DEPTH)
        left = tl.load(a + row * K + along[None, :], (row < m) & (along[None, :] < K), other=0)
        right = tl.load(b + column * stride + along[:, None], (along[:, None] < K) & (column < n), other=0)
        total = tl.dot(left, right, total, out_dtype=tl.int32)
    value = total.to(tl.float32) * tl.load(rows + row, row < m, other=0)
    if SCALED:
        value *= tl.load(columns + column, column < n, other=0)
    if BIASED:
        value += tl.load(bias + column, column < n, other=0).to(tl.float32)
    tl.store(out + row * n + column, value, (row < m) & (column < n))
