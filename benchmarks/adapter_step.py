"""Forward and backward of an adapted linear: LoKr in bypass on our int8 base, against what a user would otherwise use.

python -m benchmarks.adapter_step
"""

import torch
from lycoris.modules.lokr import LokrModule
from torch import nn

from benchmarks.interleave import ratio, report
from dedistill.adapters.attach import Adapter
from dedistill.adapters.targets import Resolved
from dedistill.models.quantize import prepare_base

WIDTH, TOKENS = 1024, 512


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH)).to(torch.bfloat16)


def ours(quant: str, factor: int):
    denoiser = network()
    prepare_base(denoiser, quant, [], "cpu")
    Adapter(denoiser, "lokr", [Resolved("0", (WIDTH, WIDTH), factor, None, "0")]).to(torch.bfloat16)
    return step(denoiser)


def rebuild(factor: int):
    """LyCORIS as it comes on a plain linear: W + dW is built in every forward."""
    denoiser = network().requires_grad_(False)
    module = LokrModule("x", denoiser[0], 1.0, 1, 1, factor=factor, full_matrix=True).to(torch.bfloat16)
    module.apply_to()
    denoiser.adapter = [module]
    return step(denoiser)


def step(denoiser: nn.Module):
    x = torch.randn(TOKENS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    return lambda: denoiser(x).square().mean().backward()


def main() -> None:
    torch.set_num_threads(1)
    rows = {}
    for factor in (4, 16):
        rows[f"LoKr f={factor}, bypass on int8, vs LyCORIS default on bf16"] = ratio(ours("int8", factor), rebuild(factor))
        rows[f"LoKr f={factor}, bypass on bf16, vs LyCORIS default on bf16"] = ratio(ours("none", factor), rebuild(factor))
        rows[f"LoKr f={factor}, bypass on int8, vs the same on quanto int8"] = ratio(
            ours("int8", factor), ours("int8-quanto", factor)
        )
    report("adapter_step", rows, f"one linear {WIDTH} x {WIDTH}, {TOKENS} tokens, bf16, one CPU thread; > 1: ours is faster")


if __name__ == "__main__":
    main()
