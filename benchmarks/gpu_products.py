"""Products of int8 codes on one GPU at the sizes of FLUX.1: our kernel in several tiles, torch's, and those of bf16.

python -m benchmarks.gpu_products --out products.json                  # about 40 seconds
python -m benchmarks.gpu_products --device cpu --small --out products.json

Both directions: outputs (codes [out, in] transposed) and gradients of inputs (codes as they lie). Microseconds. For bf16,
codes are made floats each time.
"""

import argparse
import json
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu import Clock, attempt, device_name, timed
from dedistill import kernels
from dedistill.distributed.launcher import choose_kernels
from dedistill.models.products import quantize_tokens, scaled_product
from dedistill.models.quantize import dequantized

TOKENS = (1104, 4176)
LAYERS = ((3072, 3072), (3072, 12288), (12288, 3072), (15360, 3072))
"""Inputs and outputs of linear layers."""
TILES = (
    # rows, columns, depth, warps, stages
    (128, 128, 64, 8, 3),
    (128, 128, 128, 8, 3),
    (128, 128, 128, 8, 4),
    (128, 128, 128, 8, 2),
    (128, 128, 256, 8, 3),
    (128, 256, 128, 8, 3),
    (256, 128, 128, 16, 3),
)


def tiled(a: Tensor, b: Tensor, rows: Tensor, columns: Tensor | None, tile: tuple[int, ...]) -> Tensor:
    """Our kernel with another tile, of b [n, k]; bf16."""
    import triton

    from dedistill.kernels.products import _product

    (m, k), n = a.shape, len(b)
    out = torch.empty(m, n, dtype=torch.bfloat16, device=a.device)
    *sides, warps, stages = tile
    grid = (triton.cdiv(m, sides[0]), triton.cdiv(n, sides[1]))
    kinds = (columns is not None, False)
    given = (rows, rows if columns is None else columns, rows, out)
    _product[grid](a, b, *given, m, n, b.stride(0), k, *kinds, *sides, num_warps=warps, num_stages=stages)
    return out


def one(device: str, tokens: int, inputs: int, outputs: int, *, back: bool, clock: Clock) -> dict:
    """One layer in one direction."""
    x = torch.randn(tokens, outputs if back else inputs, device=device, dtype=torch.bfloat16)
    codes = torch.randint(-127, 128, (outputs, inputs), device=device, dtype=torch.int8)
    scale = torch.rand(outputs, 1, device=device).to(torch.bfloat16) / 127
    factor = scale.flatten().float() if back else None
    columns = None if back else scale.flatten().float()
    b = codes if back else codes.t()
    a, steps = quantize_tokens(x, factor)
    us = lambda call: attempt(lambda: 1e6 * timed(call, clock, rounds=5, calls=5))  # noqa: E731

    def as_floats() -> Tensor:
        weight = dequantized(codes, scale)
        return x @ weight if back else F.linear(x, weight)

    row = {"tokens": tokens, "in": inputs, "out": outputs, "direction": "gradient" if back else "output"}
    row["least_us"] = 2e6 * tokens * inputs * outputs / 1979e12
    row |= {"bf16_us": us(as_floats), "quantize_us": us(lambda: quantize_tokens(x, factor))}
    row["ours_us"] = us(lambda: scaled_product(a, b, steps, columns, None, torch.bfloat16))
    row["torch_us"] = us(lambda: torch._int_mm(a, b))
    if back:
        row["torch_transposing_us"] = us(lambda: torch._int_mm(a, codes.t().contiguous().t()))
    truth = x.double() @ (dequantized(codes, scale).double() if back else dequantized(codes, scale).double().t())
    got = scaled_product(a, b, steps, columns, None, torch.bfloat16).double()
    row["cosine"] = float(F.cosine_similarity(got.flatten(), truth.flatten(), 0))
    if (a.device, "products") in kernels.proven and not back:
        row["tiles_us"] = {str(tile): us(lambda tile=tile: tiled(a, codes, steps, columns, tile)) for tile in TILES}
    if (a.device, "products") in kernels.proven and back:
        from dedistill.kernels.products import transposed

        row["transpose_us"] = us(lambda: transposed(codes))
        row["transposed_right"] = torch.equal(transposed(codes), codes.t())
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--seconds", type=float, default=60, help="what would start later is skipped")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    choose_kernels(exact=False)
    clock = Clock(args.device, args.seconds)
    kernels.prove(args.device)
    facts = {"device": device_name(args.device), "torch": torch.__version__, "rows": []}
    began = time.perf_counter()
    sizes = ((32,), ((64, 96),)) if args.small else (TOKENS, LAYERS)
    for tokens, (inputs, outputs), back in product(*sizes, (False, True)):
        if clock.over():
            break
        row = {"tokens": tokens, "in": inputs, "out": outputs, "back": back}
        make: Callable[[], dict] = lambda t=tokens, i=inputs, o=outputs, b=back: one(args.device, t, i, o, back=b, clock=clock)  # noqa: E731
        found = attempt(make)
        facts["rows"].append(found if isinstance(found, dict) else row | {"failed": found})
        print(json.dumps(facts["rows"][-1]), flush=True)
        args.out.write_text(json.dumps(facts, indent=1) + "\n")
    print(f"done in {time.perf_counter() - began:.0f} s: {args.out}")


if __name__ == "__main__":
    main()
