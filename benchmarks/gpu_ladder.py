"""What each change to the training step of FLUX.1 gains on one GPU, at full size on random weights.

python -m benchmarks.gpu_ladder --out ladder.json                     # about 4 minutes
python -m benchmarks.gpu_ladder --device cpu --tiny --out ladder.json # the same code on a small network

Steps with and without a change take turns in one process; each row is the median ratio of pairs. The changes are tried
here before they are built: none of them alters the package.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.gpu import FAMILY, FULL, TINY, Clock, Setup, Sizes, blank, cell, device_name, fill, line, matmul_flops, set_up
from dedistill.distributed.launcher import choose_kernels
from dedistill.models import quantize as int8

PAIRS = 3


class _OneKernel(torch.autograd.Function):
    """The int8 product with codes and scales multiplied in one kernel, by type promotion."""

    @staticmethod
    def forward(ctx, x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(codes, scale)
        return nn.functional.linear(x, codes * scale.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx, grad: Tensor):
        codes, scale = ctx.saved_tensors
        return grad @ (codes * scale.to(grad.dtype)), None, None, None


@contextmanager
def swapped(owner: object, name: str, value: object) -> Iterator[None]:
    old = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, old)


def one_kernel(setup: Setup) -> object:
    return swapped(int8, "_Int8Matmul", _OneKernel)


@contextmanager
def norms_in_bf16(setup: Setup) -> Iterator[None]:
    """LayerNorm gives the dtype it is given, as on the CPU; autocast on CUDA would make it float32."""
    plain = nn.LayerNorm.forward

    def forward(self: nn.LayerNorm, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return plain(self, x)

    with swapped(nn.LayerNorm, "forward", forward):
        yield


@contextmanager
def foreach(setup: Setup) -> Iterator[None]:
    groups = setup.optimizer.param_groups
    before = [group["foreach"] for group in groups]
    for group in groups:
        group["foreach"] = True
    yield
    for group, old in zip(groups, before):
        group["foreach"] = old


@contextmanager
def compiled(setup: Setup) -> Iterator[None]:
    """Each block compiled whole, for any size. One graph serves the blocks of a kind; with and without gradients differ."""
    torch._dynamo.config.recompile_limit = 64
    for block in FAMILY.blocks(setup.model.parts.net):
        block.compile(dynamic=True, fullgraph=True)
    yield
    for block in FAMILY.blocks(setup.model.parts.net):
        block._compiled_call_impl = None


@contextmanager
def all_at_once(setup: Setup) -> Iterator[None]:
    with one_kernel(setup), norms_in_bf16(setup), foreach(setup), compiled(setup):
        yield


CHANGES: dict[str, Callable[[Setup], object]] = {
    "one-kernel dequantization": one_kernel,
    "LayerNorm in bf16": norms_in_bf16,
    "foreach optimizer": foreach,
    "blocks compiled": compiled,
    "all of these": all_at_once,
}


def seconds(setup: Setup, clock: Clock, pixels: int, batch: int, generator: torch.Generator) -> float:
    start = clock.now()
    setup.step(pixels, batch, generator)
    return clock.now() - start


def compare(setup: Setup, change: Callable[[Setup], object], pixels: int, batch: int, clock: Clock) -> dict:
    """Steps as they are and with ``change`` in turn; > 1: the change is faster."""
    if clock.over():
        return {"status": "skipped"}
    generator = torch.Generator(setup.model.device).manual_seed(0)
    with change(setup):
        first = seconds(setup, clock, pixels, batch, generator)
    pairs, changed = [], []
    for _ in range(PAIRS):
        before = statistics.median(seconds(setup, clock, pixels, batch, generator) for _ in range(2))
        with change(setup):
            seconds(setup, clock, pixels, batch, generator)
            after = statistics.median(seconds(setup, clock, pixels, batch, generator) for _ in range(2))
        pairs.append(before / after)
        changed.append(after)
    return {"ratio": statistics.median(pairs), "pairs": pairs, "changed_ms": 1e3 * statistics.median(changed), "first_s": first}


def profile(setup: Setup, pixels: int, batch: int, clock: Clock) -> dict:
    """Kernels of one step, how long the GPU works on them, and how long the step takes."""
    from torch.profiler import ProfilerActivity, profile

    generator = torch.Generator(setup.model.device).manual_seed(0)
    setup.step(pixels, batch, generator)
    start = clock.now()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if clock.cuda else [])]) as profiler:
        setup.step(pixels, batch, generator)
        wall = clock.now() - start
    rows = [e for e in profiler.key_averages() if e.self_device_time_total > 0 and e.device_type.name == "CUDA"]
    rows.sort(key=lambda e: -e.self_device_time_total)
    waits = {e.key: e.count for e in profiler.key_averages() if "Synchronize" in e.key or e.key == "aten::item"}
    return {
        "kernels": sum(e.count for e in rows),
        "busy_ms": sum(e.self_device_time_total for e in rows) / 1e3,
        "wall_ms_profiled": 1e3 * wall,
        "waits": waits,
        "top": [{"kernel": e.key[:90], "count": e.count, "ms": e.self_device_time_total / 1e3} for e in rows[:15]],
    }


def checkpointing(setup: Setup, on: bool) -> None:
    net = setup.model.parts.net
    (net.enable_gradient_checkpointing if on else net.disable_gradient_checkpointing)()


def climb(sizes: Sizes, device: str, clock: Clock, facts: dict, write: Callable[[], None]) -> None:
    """Every stage in turn, the most wanted first; each is written down before the next."""
    peak = matmul_flops(sizes.matmul, device, clock)
    start = clock.now()
    parts = blank(sizes)
    fill(parts.net, device)
    facts["fill_s"] = clock.now() - start
    start = clock.now()
    setup = set_up(parts, sizes, "lokr", device)
    facts["start_adapter_s"] = clock.now() - start
    kinds = {t.device.type for t in (*parts.net.parameters(), *parts.net.buffers(), *setup.model.trainable().values())}
    assert kinds == {torch.device(device).type}, f"tensors on {kinds}"
    small, large = sizes.pixels
    checkpointing(setup, True)
    facts["cells"], facts["changes"] = [], []
    measured(setup, sizes, [(small, 1, True)], peak, clock, facts, write, nullcontext)
    facts["profile"] = profile(setup, small, 1, clock)
    print(json.dumps(facts["profile"], indent=1), flush=True)
    write()
    for name, change in CHANGES.items():
        row = {"change": name, "pixels": small, "batch": 1, "checkpointing": True}
        try:
            row |= compare(setup, change, small, 1, clock)
        except Exception as e:
            # an experiment that fails is a finding, and must not cost the others
            row |= {"status": f"{type(e).__name__}: {str(e)[:300]}"}
            setup.optimizer.zero_grad(set_to_none=True)
        facts["changes"].append(row)
        print(row, flush=True)
        write()
    cells = [(small, 1, False), (small, 4, False), (small, 4, True), (large, 1, True), (large, 1, False), (large, 4, True)]
    measured(setup, sizes, cells, peak, clock, facts, write, nullcontext)
    measured(setup, sizes, cells, peak, clock, facts, write, lambda: all_at_once(setup), note="all of these")


def measured(setup, sizes, cells, peak, clock, facts, write, how, note: str = "as it is") -> None:
    with how():
        for pixels, batch, checkpointed in cells:
            checkpointing(setup, checkpointed)
            row = {"adapter": "lokr", "pixels": pixels, "batch": batch, "checkpointing": checkpointed, "change": note}
            try:
                row |= cell(setup, sizes, pixels, batch, peak, clock)
            except Exception as e:
                row |= {"status": f"{type(e).__name__}: {str(e)[:300]}"}
                setup.optimizer.zero_grad(set_to_none=True)
            if clock.cuda:
                row["reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
            facts["cells"].append(row)
            print(line(row), note, flush=True)
            write()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--seconds", type=float, default=260, help="what would start later is skipped")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    choose_kernels(exact=False)
    from dataclasses import replace

    sizes = replace(TINY, steps=3) if args.tiny else replace(FULL, steps=7, warmup=2)
    facts = {"device": device_name(args.device), "torch": torch.__version__}
    began = time.perf_counter()
    climb(
        sizes,
        args.device,
        Clock(args.device, args.seconds),
        facts,
        lambda: args.out.write_text(json.dumps(facts, indent=1) + "\n"),
    )
    print(f"done in {time.perf_counter() - began:.0f} s: {args.out}")


if __name__ == "__main__":
    main()
