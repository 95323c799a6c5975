"""What holds on a GPU: the same loss and gradients as on the CPU, the same bits twice, and how fast the card is.

python -m benchmarks.gpu_checks --out checks.json
python -m benchmarks.gpu_checks --device cpu --small --out checks.json     # the same code, to see that it runs
"""

import argparse
import json
import time
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.before import swapped
from benchmarks.gpu import Clock, attempt, device_name, matmul_flops, timed
from benchmarks.gpu_attention import attention, deterministic, layouts, plans
from dedistill import kernels
from dedistill.adapters.attach import Adapter
from dedistill.adapters.layers import add_mixed
from dedistill.adapters.targets import Resolved, adaptable
from dedistill.distributed.launcher import choose_kernels
from dedistill.flow.path import flow_loss, interpolate, velocity
from dedistill.kernels import attention as cudnn
from dedistill.models import blocks as blocks_of
from dedistill.models import offload, quantize
from dedistill.models.compiled import compile_blocks
from dedistill.models.conditioning import Conditioning
from dedistill.models.model import Model
from dedistill.models.pixel_flux.family import PixelFlux
from dedistill.models.quantize import cast_float, prepare_base
from dedistill.models.swap import Swap
from dedistill.training.optim import KahanAdamW

FAMILY = PixelFlux()
TOKENS = 20
NARROW = {
    "layers": 2,
    "single_layers": 2,
    "heads": 2,
    "head_dim": 64,
    "rope_axes": [16, 24, 24],
    "text_dim": 64,
    "pooled_dim": 64,
}
WIDE = NARROW | {"layers": 1, "heads": 24, "head_dim": 128, "rope_axes": [16, 56, 56], "text_dim": 4096, "pooled_dim": 768}


def model(sizes: dict, kind: str, side: int, device: str, *, bf16: bool, mask: str = "bool", quant: str = "int8") -> Model:
    """A frozen quantized network of these sizes with a random adapter on its blocks; the same numbers on every device."""
    new = SimpleNamespace(channels=16, height=side, width=side, patch=2, **sizes)
    components = FAMILY.build(new, mask=mask, seed=0)
    cast_float(components.denoiser, torch.bfloat16 if bf16 else torch.float32)
    shapes = {n: s for n, s in adaptable(components.denoiser).items() if "transformer_blocks" in n}
    prepare_base(components.denoiser, quant, [], device)
    factor, rank = (4, None) if kind == "lokr" else (None, 4)
    targets = [Resolved(name, shape, factor, rank, "blocks") for name, shape in shapes.items()]
    adapter = Adapter(components.denoiser, kind, targets)
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.02
    adapter.to(device, torch.bfloat16 if bf16 else torch.float32)
    return Model(FAMILY, components, adapter, TOKENS, bf16=bf16, adapter=adapter, targets=targets)


def batch(side: int, text_dim: int, pooled_dim: int, *, ragged: bool) -> tuple[Tensor, Tensor, Tensor, Conditioning]:
    """Data, noise, sigma and text of two samples, on the CPU."""
    generator = torch.Generator().manual_seed(2)
    draw = lambda *shape: torch.randn(2, *shape, generator=generator)  # noqa: E731
    mask = torch.ones(2, TOKENS, dtype=torch.bool)
    mask[1, 7 if ragged else TOKENS :] = False
    return (
        draw(16, side, side),
        draw(16, side, side),
        torch.tensor([0.3, 0.8]),
        Conditioning.of(draw(TOKENS, text_dim), mask, pooled=draw(pooled_dim)),
    )


def gradients(built: Model, drawn: tuple[Tensor, Tensor, Tensor, Conditioning]) -> dict[str, Tensor]:
    """The loss and every gradient of one step, float32 on the CPU."""
    data, noise, sigma, text = (t.to(built.device) for t in drawn)
    loss = flow_loss(built.velocity(interpolate(data, noise, sigma), sigma, text), velocity(data, noise)).sum() / 2
    loss.backward()
    found = {name: p.grad.float().cpu() for name, p in built.trainable().items()} | {"loss": loss.detach().cpu()}
    built.root.zero_grad(set_to_none=True)
    return found


def agreement(device: str) -> list[dict]:
    """Loss and gradients on ``device`` against the CPU's: ||difference|| / ||CPU's in float32|| over all gradients."""
    rows = []
    for kind, ragged in product(("lora", "lokr"), (False, True)):
        drawn = batch(8, 64, 64, ragged=ragged)
        truth = gradients(model(NARROW, kind, 8, "cpu", bf16=False), drawn)
        for where, bf16 in ((device, False), ("cpu", True), (device, True)):
            found = gradients(model(NARROW, kind, 8, where, bf16=bf16), drawn)
            row = {"adapter": kind, "mixed_lengths": ragged, "device": where, "precision": "bf16" if bf16 else "fp32"}
            rows.append(
                row
                | {
                    "loss": distance(found, truth, ["loss"]),
                    "gradient": distance(found, truth, [n for n in found if n != "loss"]),
                }
            )
    return rows


def switches(device: str, names: tuple[str, ...], mixed: tuple[bool, ...]) -> list[dict]:
    """Gradients with a key that makes steps smaller or faster, against those without."""
    rows = []
    for ragged in mixed:
        drawn = batch(8, 64, 64, ragged=ragged)
        plain = {q: gradients(model(NARROW, "lokr", 8, device, bf16=True, quant=q), drawn) for q in ("int8", "fp8")}
        for name in names:
            quant = "fp8" if name == "fp8 products" else "int8"
            built = model(NARROW, "lokr", 8, device, bf16=True, quant=quant)
            denoiser = built.components.denoiser
            blocks = FAMILY.blocks(denoiser)
            if name == "swap":
                blocks_of.checkpoint_blocks(denoiser, blocks, True)
                Swap(blocks, device)
            elif name == "offloaded":
                blocks_of.checkpoint_blocks(denoiser, blocks, True, away=True)
            elif name == "compiled":
                compile_blocks(FAMILY, blocks)
            elif name.endswith("products"):
                quantize.multiply_codes(denoiser, blocks, device, "base.matmul", quant)
            with swapped(F, "scaled_dot_product_attention", F.scaled_dot_product_attention), swapped(offload, "LEAST", 1):
                proven = name != "cuDNN" or cudnn.use(device) == "cudnn"
                found, again = gradients(built, drawn), gradients(built, drawn)
            others = [n for n in found if n != "loss"]
            row = {"switch": name, "proven": proven, "mixed_lengths": ragged, "loss": distance(found, plain[quant], ["loss"])}
            row |= {"gradient": distance(found, plain[quant], others), "again": distance(again, found, others)}
            rows.append(row | {"bits_equal": all(torch.equal(found[n], plain[quant][n]) for n in found)})
    return rows


def distance(found: dict[str, Tensor], truth: dict[str, Tensor], names: list[str]) -> float:
    flat = lambda tensors: torch.cat([tensors[n].double().flatten() for n in names])  # noqa: E731
    return float((flat(found) - flat(truth)).norm() / flat(truth).norm())


def repeats(device: str, sizes: dict, side: int) -> list[dict]:
    """Are the gradients of the same step bit-equal each time, and what does it cost that they are?"""
    rows = []
    for kind in ("lora", "lokr"):
        built, drawn = (
            model(sizes, kind, side, device, bf16=True),
            batch(side, sizes["text_dim"], sizes["pooled_dim"], ragged=False),
        )
        for name, how in (("as it comes", nullcontext), ("deterministic", deterministic)):
            with how():
                first, *others = (gradients(built, drawn) for _ in range(5))
                start = time.perf_counter()
                gradients(built, drawn)
                seconds = time.perf_counter() - start
            unequal = sum(any(not torch.equal(first[n], o[n]) for o in others) for n in first)
            rows.append(
                {"adapter": kind, "switches": name, "tensors": len(first), "not_bit_equal": unequal, "seconds": seconds}
            )
    return rows


def rates(device: str, size: int, clock: Clock) -> dict:
    """Operations and bytes per second of what a step is made of."""
    flops = 2 * size**3
    draw = lambda: torch.randn(size, size, device=device)  # noqa: E731
    codes, others = (draw().mul(40).clamp(-127, 127).to(torch.int8) for _ in range(2))
    scale = torch.rand(size, 1, device=device, dtype=torch.bfloat16)
    source = torch.randn(size * size * 4, device=device)
    target = torch.empty_like(source)

    def fp8() -> float:
        a, b = draw().to(torch.float8_e4m3fn), draw().to(torch.float8_e4m3fn)
        one = torch.ones(size, 1, device=device)
        call = lambda: torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one.t(), out_dtype=torch.bfloat16)  # noqa: E731
        return flops / timed(call, clock) / 1e12

    return {
        "bf16_matmul_tflops": matmul_flops(size, device, clock) / 1e12,
        "int8_matmul_tops": attempt(lambda: flops / timed(lambda: torch._int_mm(codes, others.t()), clock) / 1e12),
        "int8_matmul_row_major_tops": attempt(lambda: flops / timed(lambda: torch._int_mm(codes, others), clock) / 1e12),
        "fp8_matmul_tflops": attempt(fp8),
        "copy_gb_s": 8 * source.numel() / timed(lambda: target.copy_(source), clock) / 1e9,
        "dequantize_two_kernels_us": 1e6 * timed(lambda: codes.to(scale.dtype) * scale, clock),
        "dequantize_one_kernel_us": 1e6 * timed(lambda: codes * scale, clock),
        "dequantize_bits_equal": torch.equal(codes.to(scale.dtype) * scale, codes * scale),
    }


def decoder(device: str, side: int, clock: Clock) -> list[dict]:
    """Seconds and memory of FLUX.1's VAE making one image, whole and in tiles."""
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16, sample_size=512, **blocks
    ).to(device)
    latents = torch.randn(1, 16, side // 8, side // 8, device=device)
    rows = []
    for tiled in (False, True):
        vae.use_tiling = tiled
        clock.reset_memory()
        with torch.no_grad():
            seconds = timed(lambda: vae.decode(latents, return_dict=False), clock, rounds=2, calls=1)
        rows.append({"pixels": side, "tiled": tiled, "seconds": seconds, "peak_gb": clock.peak_gb()})
    return rows


def optimizer(device: str, width: int, clock: Clock) -> dict:
    """Steps of AdamW on bf16 weights in one kernel against tensor by tensor: unequal bits, seconds of each."""
    shapes = [(4 * width, width)] * 40 + [(4, 4)] * 40 + [(33,), (7, 5, 3)]
    generator = torch.Generator(device).manual_seed(3)
    draw = lambda shape: (torch.randn(shape, device=device, generator=generator) * 0.02).to(torch.bfloat16)  # noqa: E731
    start = [draw(shape) for shape in shapes]
    by_tensor, at_once = (
        KahanAdamW([torch.nn.Parameter(p.clone()) for p in start], lr=1e-3, betas=(0.9, 0.99), decay=0.01) for _ in range(2)
    )
    unlike = []
    for _ in range(10):
        for a, b in zip(*(o.param_groups[0]["params"] for o in (by_tensor, at_once))):
            a.grad = draw(a.shape)
            b.grad = a.grad.clone()
        with swapped(kernels, "proven", set()):
            by_tensor.step()
        at_once.step()
        unlike.append({key: _unlike(by_tensor, at_once, key) for key in ("weight", "exp_avg", "exp_avg_sq", "kahan_comp")})
    with swapped(kernels, "proven", set()):
        slow = timed(by_tensor.step, clock)
    numbers = sum(p.numel() for p in start)
    return {"numbers": numbers, "unlike": unlike, "by_tensor_s": slow, "at_once_s": timed(at_once.step, clock)}


def _unlike(one: KahanAdamW, other: KahanAdamW, key: str) -> dict:
    """How many numbers differ, and by how much of their norm."""
    kept = lambda o: [p if key == "weight" else o.state[p][key] for p in o.param_groups[0]["params"]]  # noqa: E731
    a, b = (torch.cat([t.detach().flatten().double() for t in kept(o)]) for o in (one, other))
    return {"count": int((a != b).sum()), "relative": float((a - b).norm() / a.norm())}


def own_kernels(device: str, tokens: int, width: int, clock: Clock) -> list[dict]:
    """Our kernels against torch's: microseconds of each, and how far they are from each other and from float64."""
    draw = lambda *shape: torch.randn(*shape, device=device, dtype=torch.bfloat16)  # noqa: E731
    base, first, groups = (draw(1, tokens, 4, width), draw(4, 4), draw(1, tokens, 4, width))
    above = draw(1, tokens, 4, width)
    for tensor in (base, first, groups):
        tensor.requires_grad_()
    codes = torch.randint(-128, 128, (4 * width, 4 * width), device=device, dtype=torch.int8)
    scale = draw(4 * width, 1).abs()

    def passes() -> tuple[Tensor, ...]:
        out = add_mixed(base, first, groups)
        return out, *torch.autograd.grad(out, (base, first, groups), above)

    exact = [t.detach().double().requires_grad_() for t in (base, first, groups)]
    result = exact[0] + exact[1] @ exact[2]
    truth = (result, *torch.autograd.grad(result, exact, above.double()))
    rows = []
    for name, proven in (("torch", set()), ("ours", kernels.proven)):
        with swapped(kernels, "proven", proven):
            far = [float((a - b).detach().norm() / b.detach().norm()) for a, b in zip(passes(), truth)]
            again = all(torch.equal(a, b) for a, b in zip(passes(), passes()))
            made = quantize.dequantized(codes, scale)
            rows.append({"kernels": name, "mixing_us": 1e6 * timed(passes, clock), "from_float64": far, "repeatable": again})
            rows[-1] |= {"dequantize_us": 1e6 * timed(lambda: quantize.dequantized(codes, scale), clock)}
            rows[-1] |= {"dequantize_bits_equal": torch.equal(made, codes * scale)}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="small tensors and networks")
    parser.add_argument("--stages", nargs="+", help="only these")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    choose_kernels(exact=False)
    device, small, clock = args.device, args.small, Clock(args.device, 1e9)
    stages = {
        "rates": lambda: rates(device, 64 if small else 8192, clock),
        "agreement": lambda: agreement(device),
        "switches": lambda: switches(device, ("swap", "offloaded", "cuDNN", "int8 products", "fp8 products"), (False, True)),
        "repeats": lambda: repeats(device, NARROW if small else WIDE, 8 if small else 64),
        "decoder": lambda: decoder(device, 64 if small else 1024, clock),
        "attention": lambda: attention(device, (64,) if small else (1104, 4176), clock),
        "layouts": lambda: layouts(device, (64,) if small else (1104, 4176), clock),
        "plans": lambda: plans(device, 64 if small else 1104, clock),
        "optimizer": lambda: optimizer(device, 16 if small else 768, clock),
        "kernels": lambda: own_kernels(device, 64 if small else 1104, 16 if small else 768, clock),
        "compiled": lambda: switches(device, ("compiled",), (False,)),  # takes the longest
    }
    facts = {"device": device_name(device), "torch": torch.__version__}
    for name, stage in ((name, stages[name]) for name in args.stages or stages):
        start = time.perf_counter()
        facts[name] = attempt(stage)
        for row in facts[name] if isinstance(facts[name], list) else [facts[name]]:
            print(name, row, flush=True)
        print(f"{name}: {time.perf_counter() - start:.1f} s", flush=True)
        args.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
