"""Kernels and bytes of a step of FLUX.1 on a card, as it was done at first and as it is (benchmarks.forecast --counts).

At first: LyCORIS' own forward, torch's autocast (LayerNorm in float32), codes that are converted before they are multiplied, an
optimizer that goes from tensor to tensor. Each of the rows between has one of these changed, as in ``benchmarks.gpu_ladder``.
"""

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from lycoris.modules.lokr import LokrModule
from torch import Tensor

from dedistill.adapters.layers import LokrLayer
from dedistill.forecast import kernels
from dedistill.forecast.depth import estimate
from dedistill.forecast.paper import Case
from dedistill.models import quantize
from dedistill.models.model import Model
from dedistill.models.registry import get_family
from dedistill.recipe import load_recipe
from dedistill.training.optim import KahanAdamW

RESULTS = Path(__file__).parent / "results" / "counts.json"
COMPILED = RESULTS.with_name("compiled.json")
MARKS = "<!-- counts: python -m benchmarks.forecast --counts -->", "<!-- end of counts -->"
SAMPLE = (16, 64, 64)
"""Latents of an image of 512 pixels."""
LENGTH = 80
"""Tokens of a caption."""
SETTINGS = ["train.micro_batch=1", "train.batch=1", "data.resolutions=[512]", "validate.every=0"]


@dataclass
class Counts:
    name: str
    kernels: int
    gigabytes: float


# --- how it was done at first ----------------------------------------------------------------------------------------


def autocast(stack: ExitStack) -> None:
    velocity, linear = Model.velocity, quantize.QuantizedLinear.forward

    def cast(model: Model, *args: object) -> Tensor:
        with torch.autocast(model.device.type, torch.bfloat16):
            return velocity(model, *args)

    stack.enter_context(patch.object(Model, "velocity", cast))
    stack.enter_context(
        patch.object(quantize.QuantizedLinear, "forward", lambda module, x: linear(module, x.to(torch.bfloat16)))
    )


def lycoris(stack: ExitStack) -> None:
    stack.enter_context(patch.object(LokrLayer, "forward", LokrModule.forward))


def two_kernels(stack: ExitStack) -> None:
    stack.enter_context(patch.object(quantize, "dequantized", lambda codes, scale, **_: codes.to(scale.dtype) * scale))


def tensor_by_tensor(stack: ExitStack) -> None:
    stack.enter_context(patch.object(kernels, "kahan_step", KahanAdamW.step))


FIRST = {
    "LyCORIS' forward": lycoris,
    "autocast": autocast,
    "codes converted, then multiplied": two_kernels,
    "optimizer tensor by tensor": tensor_by_tensor,
}


def counted(name: str, changes: list[Callable[[ExitStack], None]]) -> Counts:
    recipe = load_recipe("dedistill:flux_schnell", SETTINGS)
    with ExitStack() as stack:
        for change in changes:
            change(stack)
        found = estimate(Case(recipe, get_family(recipe.model.family), SAMPLE, LENGTH))
    work = found.total(*found.work)
    return Counts(name, work.kernels, round(work.bytes / 1e9, 1))


def rows() -> list[Counts]:
    """As at first, with each of its parts alone, and as it is."""
    every = [counted("as at first, all of these", [*FIRST.values()])]
    alone = [counted(f"as it is, but {name}", [change]) for name, change in FIRST.items()]
    return [*every, *alone, counted("as it is", [])]


def table(found: list[Counts]) -> str:
    """As docs/performance.md shows it."""
    first = found[0]
    lines = ["| a step at 512 px, batch 1, all blocks checkpointed | kernels | GB moved |", "|---|---|---|"]
    for row in found:
        kernels, size = f"{row.kernels:,}", f"{row.gigabytes:,.0f}"
        if row is not first:
            kernels += f" ({row.kernels / first.kernels - 1:+.0%})"
            size += f" ({row.gigabytes / first.gigabytes - 1:+.0%})"
        lines.append(f"| {row.name} | {kernels} | {size} |")
    kernels = json.loads(COMPILED.read_text())["kernels, all blocks checkpointed"]
    part = f"{kernels:,} ({kernels / first.kernels - 1:+.0%}) | not counted"
    lines.append(f'| `train.compile = "blocks"` (`python -m benchmarks.compiled`) | {part} |')
    return "\n".join(lines)


def write(page: Path) -> None:
    found = rows()
    RESULTS.write_text(json.dumps([asdict(row) for row in found], indent=1) + "\n")
    before, after = page.read_text().split(MARKS[0])[0], page.read_text().split(MARKS[1])[1]
    page.write_text(f"{before}{MARKS[0]}\n\n{table(found)}\n\n{MARKS[1]}{after}")


def read() -> list[Counts]:
    return [Counts(**row) for row in json.loads(RESULTS.read_text())]
