"""What each change to the training step of FLUX.1 gains on one GPU, at full size on random weights.

python -m benchmarks.gpu_ladder --out ladder.json                     # about 4 minutes
python -m benchmarks.gpu_ladder --device cpu --tiny --out ladder.json # the same code on a small network

Steps as they are and with a part done as before take turns in one process; each row is the median ratio of pairs.
Steps that are recorded and played from one launch, and a base of bf16 weights, are tried here before they are built.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.before import OFF
from benchmarks.gpu import FULL, TINY, Clock, Setup, Sizes, blank, cell, device_name, fill, line, matmul_flops, set_up
from benchmarks.gpu_changes import (
    both,
    both_fp8,
    checkpointing,
    compiled,
    compiled_apart,
    compiled_cudnn,
    cudnn,
    fp8_products,
    graphed,
    half_checkpointed,
    int8_products,
    offloaded,
    recorded_floats,
    swap,
)
from dedistill.distributed.launcher import choose_kernels

PAIRS = 3
SWAPPED = 3
"""One block in so many waits on the CPU in the last rows."""


def seconds(setup: Setup, clock: Clock, pixels: int, batch: int, generator: torch.Generator) -> float:
    start = clock.now()
    setup.step(pixels, batch, generator)
    return clock.now() - start


def compare(setup: Setup, change: Callable[[Setup], object], pixels: int, batch: int, clock: Clock) -> dict:
    """Steps as they are and with ``change`` in turn; > 1: slower with it."""
    if clock.over():
        return {"status": "skipped"}
    generator = torch.Generator(setup.model.device).manual_seed(0)
    step = lambda: seconds(setup, clock, pixels, batch, generator)  # noqa: E731
    with change(setup):
        first = step()
    ours, others = [], []
    for _ in range(PAIRS):
        step()
        ours.append(statistics.median(step() for _ in range(2)))
        with change(setup):
            step()
            others.append(statistics.median(step() for _ in range(2)))
    pairs = [other / own for own, other in zip(ours, others)]
    milliseconds = {"ms": 1e3 * statistics.median(ours), "changed_ms": 1e3 * statistics.median(others)}
    return {"ratio": statistics.median(pairs), "pairs": pairs, "first_s": first} | milliseconds


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


def placed(sizes: Sizes, device: str) -> Setup:
    """The network with its adapter, all of it on ``device``."""
    components = blank(sizes)
    fill(components.denoiser, device)
    setup = set_up(components, sizes, "lokr", device)
    denoiser, trained = components.denoiser, setup.model.trainable()
    kinds = {t.device.type for t in (*denoiser.parameters(), *denoiser.buffers(), *trained.values())}
    assert kinds == {torch.device(device).type}, f"tensors on {kinds}"
    return setup


@dataclass
class Ladder:
    """One network, what is done with it by stages, and where it is written down."""

    setup: Setup
    sizes: Sizes
    peak: float
    clock: Clock
    facts: dict
    write: Callable[[], None]

    def stages(self) -> dict[str, Callable[[], object]]:
        small, large = self.sizes.pixels
        one, batch, high = (small, 1, True), (small, 4, False), (large, 1, True)
        products = [batch, high, one]
        return {
            "eager": lambda: self.cells("eager", one, (small, 1, False)),
            "profile": lambda: self.profiled("eager", small),
            "profile 1024": lambda: self.profiled("eager, 1024 px", large),
            "recorded 512": lambda: self.switched(graphed, "recorded", one),
            "recorded 512, nothing computed again": lambda: self.switched(graphed, "recorded", (small, 1, False)),
            "int8 products": lambda: self.switched(int8_products, "int8 products", *products),
            "changes": lambda: changes(self.setup, small, self.clock, self.facts, self.write),
            "eager, batches": lambda: self.cells("eager", batch, high, (small, 4, True)),
            "recorded 1024": lambda: self.switched(graphed, "recorded", high),
            "recorded, bf16 base": lambda: self.switched(recorded_floats, "recorded, bf16 base", (small, 1, False)),
            "half checkpointed": lambda: self.switched(
                half_checkpointed, "half checkpointed", (small, 1, None), (small, 4, None)
            ),
            "compiled": lambda: self.switched(compiled, "compiled blocks", high, one, batch),
            "compiled, int8 products": lambda: self.switched(both, "compiled blocks, int8 products", high, batch),
            "fp8 products": lambda: self.switched(fp8_products, "fp8 products", high, batch),
            "compiled, fp8 products": lambda: self.switched(both_fp8, "compiled blocks, fp8 products", high, batch),
            "compiled, kernels apart": lambda: self.switched(compiled_apart, "compiled blocks, kernels apart", one),
            "compiled, cuDNN": lambda: self.switched(compiled_cudnn, "compiled blocks, cuDNN's attention", high, batch),
            "cuDNN": lambda: self.switched(cudnn, "cuDNN's attention", high, batch, one),
            "offloaded": lambda: self.switched(offloaded, "inputs of blocks on the CPU", (large, 1, None), (small, 4, None)),
            "profile compiled": lambda: self.profiled("compiled blocks", small, compiled),
            "swap": self.waiting,
        }

    def cells(self, name: str, *sizes_of: tuple[int, int, bool | None]) -> None:
        measured(self.setup, self.sizes, sizes_of, self.peak, self.clock, self.facts, self.write, note=name)

    def switched(self, change: Callable, name: str, *sizes_of: tuple[int, int, bool | None]) -> None:
        with change(self.setup):
            self.cells(name, *sizes_of)

    def profiled(self, name: str, pixels: int, change: Callable = nullcontext) -> None:
        with change(self.setup):
            checkpointing(self.setup, True)
            self.facts["profiles"][name] = profile(self.setup, pixels, 1, self.clock)
        print(name, json.dumps(self.facts["profiles"][name] | {"top": []}), flush=True)

    def waiting(self) -> None:
        """Last, since blocks do not come back."""
        small, large = self.sizes.pixels
        blocks = len(self.setup.model.family.blocks(self.setup.model.components.denoiser))
        self.facts["swapped_bytes"] = swap(self.setup, max(3, blocks // SWAPPED))
        self.cells(f"one block in {SWAPPED} waits on the CPU", (small, 1, True), (large, 1, True))


def climb(sizes: Sizes, device: str, clock: Clock, facts: dict, write: Callable[[], None], wanted: list[str] | None) -> None:
    """Every stage in turn, or those that are ``wanted``, the most wanted first; each is written down before the next."""
    peak = matmul_flops(sizes.matmul, device, clock)
    facts |= {"matmul_tflops": peak / 1e12, "cells": [], "changes": [], "profiles": {}, "spent": {}}
    setup = placed(sizes, device)
    stages = Ladder(setup, sizes, peak, clock, facts, write).stages()
    for name in wanted or stages:
        if clock.over():
            return
        start = clock.now()
        try:
            stages[name]()
        except Exception as e:
            # an experiment that fails is a finding, and must not cost the others
            facts["spent"][name + " failed"] = f"{type(e).__name__}: {str(e)[-600:]}"
            print(name, facts["spent"][name + " failed"], flush=True)
            setup.optimizer.zero_grad(set_to_none=True)
        facts["spent"][name] = clock.now() - start
        write()


def changes(setup: Setup, pixels: int, clock: Clock, facts: dict, write: Callable[[], None]) -> None:
    """Each way in turn against the same step without it."""
    checkpointing(setup, True)
    for name, change in OFF.items():
        row = {"change": name, "pixels": pixels, "batch": 1} | compare(setup, change, pixels, 1, clock)
        facts["changes"].append(row)
        print(row, flush=True)
        write()


def measured(setup, sizes, cells, peak, clock, facts, write, note: str) -> None:
    for pixels, batch, checkpointed in cells:
        if checkpointed is not None:  # as it is
            checkpointing(setup, checkpointed)
        row = {"adapter": "lokr", "pixels": pixels, "batch": batch, "checkpointing": checkpointed, "how": note}
        row |= cell(setup, sizes, pixels, batch, peak, clock)
        if clock.cuda:
            row["reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
        facts["cells"].append(row)
        print(line(row), note, flush=True)
        write()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--stages", nargs="+", help="only these")
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
        args.stages,
    )
    print(f"done in {time.perf_counter() - began:.0f} s: {args.out}")


if __name__ == "__main__":
    main()
