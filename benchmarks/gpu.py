"""Training steps of FLUX.1 at full size with random weights on one GPU: time, useful operations, memory.

python -m benchmarks.gpu                             # the whole table, under 8 minutes
python -m benchmarks.gpu --tiny --device cpu         # the same code on a small network, to see that it runs

An int8 base, LoKr of 605 M numbers and LoRA of rank 16 on all blocks, 512 and 1024 px, 80 text tokens that are all real,
batch 1 and 4, gradient checkpointing off and on, the optimizer in bf16. Weights, images and texts are random, never
zero: chips run faster on zeros. A cell that does not fit says "out of memory", one that the time did not allow "skipped".
"""

import argparse
import gc
import json
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.flops import Tokens, adapter_flops, model_flops
from dedistill.adapters.attach import Adapter, check_started, initialise
from dedistill.adapters.targets import adaptable, resolve_targets
from dedistill.distributed.launcher import choose_kernels
from dedistill.evaluation.sweep import save_png
from dedistill.flow.path import flow_loss, interpolate, velocity
from dedistill.models.conditioning import Conditioning
from dedistill.models.family import Components
from dedistill.models.model import Model
from dedistill.models.pixel_flux.family import PixelFlux
from dedistill.models.quantize import cast_float, dense_weight, prepare_base, storage_bytes
from dedistill.recipe import Recipe
from dedistill.recipe.resolve import recipe_of
from dedistill.sampling.sampler import Sampling, sample, start_noise
from dedistill.training.optim import make_optimizer

RESULTS = Path(__file__).parent / "results"
TEXT, CHANNELS, PATCH, VAE = 80, 16, 2, 8
FILL = 0.02
FAMILY = PixelFlux()  # FLUX without its encoders: 16 channels in patches of 2 are the latents of FLUX.1


@dataclass(frozen=True)
class Sizes:
    """A network, the images it is shown, and how long it is timed."""

    network: dict
    pixels: tuple[int, ...]
    steps: int
    warmup: int
    matmul: int


FLUX = {"layers": 19, "single_layers": 38, "heads": 24, "head_dim": 128, "rope_axes": [16, 56, 56]}
SMALL = {"layers": 1, "single_layers": 2, "heads": 2, "head_dim": 16, "rope_axes": [4, 6, 6]}
FULL = Sizes(FLUX | {"text_dim": 4096, "pooled_dim": 768}, pixels=(512, 1024), steps=12, warmup=3, matmul=8192)
TINY = Sizes(SMALL | {"text_dim": 16, "pooled_dim": 16}, pixels=(32, 64), steps=2, warmup=1, matmul=64)
ADAPTERS = {
    "lokr": {"kind": "lokr", "init": "perturbed_normal", "targets": [{"preset": "libreflux", "factor": 4}]},
    "lora": {"kind": "lora", "targets": [{"preset": "blocks", "rank": 16}]},
}


def recipe_for(sizes: Sizes, adapter: str) -> Recipe:
    side = sizes.pixels[0] // VAE
    new = {"channels": CHANNELS, "height": side, "width": side, "patch": PATCH, **sizes.network}
    train = {"steps": sizes.steps, "batch": 1, "lr": 1e-4, "max_grad_norm": 1.0, "optimizer": "adamw_bf16", "precision": "bf16"}
    return recipe_of(
        {
            "run": {"name": "benchmark", "out": "unused"},
            "model": {"family": FAMILY.spec.name, "new": new, "text_length": TEXT},
            "base": {"quant": "int8"},
            "adapter": ADAPTERS[adapter],
            "data": {"source": "digits"},
            "train": train,
        }
    )


def blank(sizes: Sizes) -> Components:
    """The network as shapes without numbers."""
    with torch.device("meta"):
        return FAMILY.build(recipe_for(sizes, "lokr").model.new)


def fill(denoiser: nn.Module, device: str) -> None:
    """Random bf16 weights made on the device and quantized block by block: never more than one block unquantized."""
    cast_float(denoiser, torch.bfloat16)
    generator = torch.Generator(device).manual_seed(0)
    for block in FAMILY.blocks(denoiser):
        materialise(block, device, generator)
        prepare_base(block, "int8", [], device)
    for child in denoiser.children():
        if not isinstance(child, nn.ModuleList):
            materialise(child, device, generator)
    prepare_base(denoiser, "int8", FAMILY.presets(denoiser)["blocks"], device)


def materialise(module: nn.Module, device: str, generator: torch.Generator) -> None:
    module.to_empty(device=device)
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            if isinstance(part, nn.RMSNorm):
                nn.init.ones_(parameter)
            else:
                nn.init.normal_(parameter, std=FILL, generator=generator)


@dataclass
class Setup:
    """A model with one adapter, started as in training, and what its steps cost."""

    model: Model
    optimizer: torch.optim.Optimizer
    recipe: Recipe

    def flops(self, pixels: int) -> tuple[int, int]:
        """Of one sample: the base alone, and with the adapter."""
        tokens = Tokens((pixels // VAE // PATCH) ** 2, TEXT)
        base = model_flops(self.model.components.denoiser, tokens)
        return base, base + adapter_flops(self.model.targets, self.recipe.adapter.kind, tokens)

    def step(self, pixels: int, batch: int, generator: torch.Generator) -> float:
        """One optimizer step on fresh random samples; the loss."""
        loss = self.forward_backward(*self.samples(pixels, batch, generator))
        norm = nn.utils.clip_grad_norm_(self.model.trainable().values(), self.recipe.train.max_grad_norm, foreach=True)
        if not norm.isfinite():
            raise FloatingPointError("the gradient is not finite")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def samples(self, pixels: int, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Random data and noise [B, C, H, W], sigma [B], and a caption's tokens [B, T, D] and vector [B, P]."""
        device, new = self.model.device, self.recipe.model.new
        draw = lambda *shape: torch.randn(batch, *shape, device=device, generator=generator)  # noqa: E731
        data, noise = (draw(CHANNELS, pixels // VAE, pixels // VAE) for _ in range(2))
        return data, noise, draw().sigmoid(), draw(TEXT, new.text_dim), draw(new.pooled_dim)

    def forward_backward(self, data: Tensor, noise: Tensor, sigma: Tensor, tokens: Tensor, pooled: Tensor) -> Tensor:
        """The mean loss; its gradient is added to what is there."""
        text = Conditioning.of(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool), pooled=pooled)
        predicted = self.model.velocity(interpolate(data, noise, sigma), sigma, text)
        loss = flow_loss(predicted, velocity(data, noise)).sum() / len(data)
        loss.backward()
        return loss.detach()


def set_up(components: Components, sizes: Sizes, name: str, device: str) -> Setup:
    """Attach and start the adapter of that name, in the order of dedistill.models.model."""
    recipe, denoiser = recipe_for(sizes, name), components.denoiser
    table = recipe.adapter
    targets = resolve_targets(table, adaptable(denoiser), FAMILY.presets(denoiser))
    with torch.device(device):
        adapter = Adapter(denoiser, table.kind, targets)
    weight = lambda name: dense_weight(denoiser.get_submodule(name))  # noqa: E731
    for layer, module in adapter.by_target.items():
        initialise(module, layer, lambda n=layer: weight(n), init=table.init, scale=table.init_scale, seed=0)
    adapter.to(torch.bfloat16)
    check_started(adapter.by_target, weight, init=table.init, scale=table.init_scale)
    model = Model(FAMILY, components, adapter, TEXT, bf16=True, adapter=adapter, targets=targets)
    return Setup(model, make_optimizer(recipe, model.trainable().values()), recipe)


class Clock:
    """Wall time with the device's queue run empty, and its memory."""

    def __init__(self, device: str, seconds: float):
        self.cuda, self.start, self.seconds = device.startswith("cuda"), time.perf_counter(), seconds

    def now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def over(self) -> bool:
        return time.perf_counter() - self.start > self.seconds

    def reset_memory(self) -> None:
        if self.cuda:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_gb(self) -> float | None:
        return torch.cuda.max_memory_allocated() / 1e9 if self.cuda else None


def timed(call: Callable[[], object], clock: Clock, rounds: int = 7, calls: int = 5) -> float:
    """Seconds per call: the median round, the first left out."""
    seconds = []
    for _ in range(rounds):
        start = clock.now()
        for _ in range(calls):
            call()
        seconds.append((clock.now() - start) / calls)
    return statistics.median(seconds[1:])


def attempt(call: Callable[[], float]) -> float | str:
    """What ``call`` gives, or why it gives nothing; one missing kernel must not cost the others."""
    try:
        return call()
    except Exception as e:
        return f"{type(e).__name__}: {str(e)[:300]}"


def matmul_flops(size: int, device: str, clock: Clock) -> float:
    """Operations per second of bf16 matmuls of that side on random numbers: the median of five rounds of ten."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    rounds = []
    for _ in range(6):
        start = clock.now()
        for _ in range(10):
            a @ b
        rounds.append(10 * 2 * size**3 / (clock.now() - start))
    return statistics.median(rounds[1:])


def cell(setup: Setup, sizes: Sizes, pixels: int, batch: int, peak: float, clock: Clock) -> dict:
    """Step time, utilization and memory of one setting, or why there is none."""
    if clock.over():
        return {"status": "skipped"}
    clock.reset_memory()
    generator = torch.Generator(setup.model.device).manual_seed(0)
    seconds, loss = [], float("nan")
    try:
        for _ in range(sizes.steps):
            start = clock.now()
            loss = setup.step(pixels, batch, generator)
            seconds.append(clock.now() - start)
            if clock.over() and len(seconds) > 2 * sizes.warmup:
                break
    except torch.OutOfMemoryError:
        setup.optimizer.zero_grad(set_to_none=True)
        return {"status": "out of memory"}
    step = statistics.median(seconds[sizes.warmup :])
    base, useful = (batch * flops / step for flops in setup.flops(pixels))
    return {
        "status": "ok",
        "steps_timed": len(seconds) - sizes.warmup,
        "step_ms": 1e3 * step,
        "sample_ms": 1e3 * step / batch,
        "useful_tflops": useful / 1e12,
        "useful_utilization": useful / peak,
        "mfu": base / peak,
        "peak_gb": clock.peak_gb(),
        "loss": loss,
    }


def preview(setup: Setup, sizes: Sizes, file: Path) -> None:
    """Four steps from noise by the trained model; three latent channels as RGB, to see that sampling runs."""
    side = sizes.pixels[0] // VAE
    latents = sample(setup.model, ["a preview"], start_noise(0, 1, (CHANNELS, side, side)), Sampling(steps=4))
    if not latents.isfinite().all():
        raise FloatingPointError("the preview is not finite")
    save_png(latents[0, :3], file)


def line(row: dict) -> str:
    how = "checkpointed" if row["checkpointing"] else ""
    where = f"{row['adapter']:5} {row['pixels']:5} px  batch {row['batch']}  {how:12}"
    if row["status"] != "ok":
        return f"{where}  {row['status']}"
    memory = f"{row['peak_gb']:7.1f} GB" if row["peak_gb"] is not None else ""
    return (
        f"{where} {row['step_ms']:9.1f} ms/step {row['sample_ms']:9.1f} ms/sample {row['useful_tflops']:8.3g} TFLOP/s"
        f"  useful {row['useful_utilization']:6.1%}  MFU {row['mfu']:6.1%} {memory}"
    )


def measure(sizes: Sizes, device: str, out: Path, clock: Clock) -> None:
    """Every cell in turn; the file is written anew after each, so that a killed run keeps what it measured."""
    peak = matmul_flops(sizes.matmul, device, clock)
    components = blank(sizes)
    fill(components.denoiser, device)
    facts = {
        "device": device_name(device),
        "torch": torch.__version__,
        "matmul_tflops": peak / 1e12,
        "base_gb": storage_bytes(components.denoiser) / 1e9,
        "text_tokens": TEXT,
        "parameters": {},
        "rows": [],
    }
    print(
        f"{facts['device']}, torch {torch.__version__}: base {facts['base_gb']:.3g} GB, bf16 matmul {peak / 1e12:.3g} TFLOP/s"
    )
    for name in ADAPTERS:
        setup = set_up(components, sizes, name, device)
        facts["parameters"][name] = sum(p.numel() for p in setup.model.trainable().values())
        for pixels, batch, checkpointing in product(sizes.pixels, (1, 4), (False, True)):
            (
                components.denoiser.enable_gradient_checkpointing
                if checkpointing
                else components.denoiser.disable_gradient_checkpointing
            )()
            row = {"adapter": name, "pixels": pixels, "batch": batch, "checkpointing": checkpointing}
            row |= cell(setup, sizes, pixels, batch, peak, clock)
            facts["rows"].append(row)
            print(line(row), flush=True)
            out.write_text(json.dumps(facts, indent=1) + "\n")
        if name == "lokr":
            clock.reset_memory()
            preview(setup, sizes, out.with_suffix(".png"))
        setup.model.adapter.detach_from_base()
        del setup
    print(f"done in {time.perf_counter() - clock.start:.0f} s: {out}")


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.processor() or "cpu"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a small network, two steps a cell")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="JSON file; default benchmarks/results/gpu_DEVICE.json")
    parser.add_argument("--seconds", type=float, default=450, help="cells that would start later are skipped")
    args = parser.parse_args(argv)
    choose_kernels(exact=False)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        print("error: no GPU here; --tiny --device cpu runs the small network", file=sys.stderr)
        return 1
    out = args.out or RESULTS / f"gpu_{re.sub(r'[^a-z0-9]+', '_', device_name(args.device).lower())}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    measure(TINY if args.tiny else FULL, args.device, out, Clock(args.device, args.seconds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
