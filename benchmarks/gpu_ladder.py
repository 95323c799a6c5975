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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from benchmarks.before import OFF, relink, swapped
from benchmarks.gpu import FULL, TINY, Clock, Setup, Sizes, blank, cell, device_name, fill, line, matmul_flops, set_up
from dedistill.distributed.launcher import choose_kernels
from dedistill.kernels import attention
from dedistill.models import blocks as blocks_of
from dedistill.models import compiled as compiling
from dedistill.models import quantize
from dedistill.models.products import FP8
from dedistill.models.swap import Swap, spread

PAIRS = 3


# --- what is not built yet -------------------------------------------------------------------------------------------


@contextmanager
def graphed(setup: Setup) -> Iterator[None]:
    """Forward and backward of each shape recorded once, then played from one launch; gradients stay where they are."""
    if setup.model.device.type != "cuda":
        yield
        return
    eager, trained = setup.forward_backward, list(setup.model.trainable().values())
    recorded: dict[tuple, tuple] = {}

    def play(*samples: Tensor) -> Tensor:
        key = (*(s.shape for s in samples), setup.model.components.denoiser.is_gradient_checkpointing)
        if key not in recorded:
            recorded[key] = record(samples)
        graph, inputs, loss = recorded[key]
        for held, sample in zip(inputs, samples):
            held.copy_(sample)
        graph.replay()
        return loss

    def record(samples: tuple[Tensor, ...]) -> tuple:
        inputs, stream = [s.clone() for s in samples], torch.cuda.Stream()
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                eager(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = eager(*inputs)
        torch._foreach_zero_([p.grad for p in trained])
        return graph, inputs, loss

    zero = lambda set_to_none: torch._foreach_zero_([p.grad for p in trained if p.grad is not None])  # noqa: E731
    with swapped(setup, "forward_backward", play), swapped(setup.optimizer, "zero_grad", zero):
        yield
    recorded.clear()
    setup.optimizer.zero_grad(set_to_none=True)


@contextmanager
def dense(setup: Setup) -> Iterator[None]:
    """The base as bf16 weights."""
    denoiser = setup.model.components.denoiser
    linears = [module for module in denoiser.modules() if isinstance(module, quantize.QuantizedLinear)]
    codes = {module: module.weight for module in linears}
    for module in linears:
        module.weight = nn.Parameter(module.dequantized(), requires_grad=False)
    with swapped(quantize.QuantizedLinear, "forward", lambda module, x: nn.functional.linear(x, module.weight, module.bias)):
        relink(setup)
        yield
    for module in linears:
        module.weight = codes[module]
    relink(setup)


@contextmanager
def int8_products(setup: Setup) -> Iterator[None]:
    """base.matmul = "int8"."""
    denoiser = setup.model.components.denoiser
    multiplied = quantize.multiply_codes(denoiser, setup.model.family.blocks(denoiser), setup.model.device, "base.matmul")
    yield
    for name in multiplied:
        denoiser.get_submodule(name).products = False


@contextmanager
def fp8_products(setup: Setup) -> Iterator[None]:
    """base.quant and base.matmul = "fp8", of the numbers that the int8 base stands for."""
    denoiser = setup.model.components.denoiser
    linears = [module for module in denoiser.modules() if isinstance(module, quantize.QuantizedLinear)]
    before = {module: (module.weight, module.weight_scale) for module in linears}

    def store(module: nn.Module, weight: Tensor, scale: Tensor) -> None:
        module.weight, module.weight_scale = (nn.Parameter(t, requires_grad=False) for t in (weight, scale))

    for module in linears:
        store(module, *quantize.quantize_rows(module.dequantized(), FP8))
    multiplied = quantize.multiply_codes(
        denoiser, setup.model.family.blocks(denoiser), setup.model.device, "base.matmul", "fp8"
    )
    relink(setup)
    yield
    for name in multiplied:
        denoiser.get_submodule(name).products = False
    for module in linears:
        store(module, *before[module])
    relink(setup)


@contextmanager
def half_checkpointed(setup: Setup) -> Iterator[None]:
    """train.gradient_checkpointing = half of the blocks."""
    denoiser = setup.model.components.denoiser
    blocks = setup.model.family.blocks(denoiser)
    blocks_of.checkpoint_blocks(denoiser, blocks, len(blocks) // 2)
    yield
    checkpointing(setup, True)


@contextmanager
def compiled(setup: Setup) -> Iterator[None]:
    """train.compile = "blocks"; without a GPU, graphs alone."""
    family = setup.model.family
    blocks = family.blocks(setup.model.components.denoiser)
    with swapped(compiling, "COMPILER", "inductor" if setup.model.device.type == "cuda" else "eager"):
        compiling.compile_blocks(family, blocks)
        yield
    for block in blocks:
        del block.forward


@contextmanager
def compiled_apart(setup: Setup) -> Iterator[None]:
    """The same without kernels that are made one."""
    with swapped(compiling, "OPTIONS", compiling.OPTIONS | {"combo_kernels": False}), compiled(setup):
        yield


@contextmanager
def cudnn(setup: Setup) -> Iterator[None]:
    """train.attention = "cudnn"."""
    with swapped(F, "scaled_dot_product_attention", F.scaled_dot_product_attention):
        if attention.use(setup.model.device) != "cudnn" and setup.model.device.type == "cuda":
            raise RuntimeError("cuDNN's attention was not proven; the note above says why")
        yield


@contextmanager
def compiled_cudnn(setup: Setup) -> Iterator[None]:
    with cudnn(setup), compiled(setup):
        yield


@contextmanager
def offloaded(setup: Setup) -> Iterator[None]:
    """train.offload_activations = true."""
    denoiser = setup.model.components.denoiser
    blocks_of.checkpoint_blocks(denoiser, setup.model.family.blocks(denoiser), True, away=True)
    yield
    checkpointing(setup, True)


@contextmanager
def both(setup: Setup) -> Iterator[None]:
    with int8_products(setup), compiled(setup):
        yield


@contextmanager
def both_fp8(setup: Setup) -> Iterator[None]:
    with fp8_products(setup), compiled(setup):
        yield


@contextmanager
def recorded_floats(setup: Setup) -> Iterator[None]:
    with dense(setup), graphed(setup):
        yield


def swap(setup: Setup, count: int) -> int:
    """base.swap = ``count``, for good; returns the bytes that wait on the CPU."""
    blocks = setup.model.family.blocks(setup.model.components.denoiser)
    return int(Swap([blocks[i] for i in spread(count, len(blocks))], setup.model.device).facts["host_bytes"])


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


def checkpointing(setup: Setup, on: bool) -> None:
    denoiser = setup.model.components.denoiser
    if not on:
        return denoiser.disable_gradient_checkpointing()
    # nothing is drawn at random within a block, and the state of a GPU's generator cannot be read while a graph is recorded
    denoiser.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False, preserve_rng_state=False))


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
