"""The weight change an adapter stands for: one formula for init checks, merging, export and tests."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def delta(module: nn.Module) -> Tensor:
    """The change of weight [out, in], float32, of one LyCORIS LoKr or LoRA module."""
    return weight_change({**dict(module.named_parameters()), "alpha": module.alpha})


def weight_change(factors: Mapping[str, Tensor]) -> Tensor:
    """The change of weight [out, in], float32, that one layer's ``factors`` stand for, named as LyCORIS names them.

    LoKr: lokr_w1 (x) lokr_w2, each alone or as a product _a _b; LoRA: lora_up.weight lora_down.weight; diff: the change
    itself. What is a product is scaled by alpha / rank, once; a LoKr of two full factors has no rank, so its alpha means
    nothing. LyCORIS' own ``get_diff_weight`` applies that scale twice (4.1.3), hence not used.
    """
    f = {name: tensor.float() for name, tensor in factors.items()}
    if "diff" in f:
        return f["diff"]
    if "lora_up.weight" in f:
        product = f["lora_up.weight"] @ f["lora_down.weight"]
    else:
        w1, w2 = (f[w] if w in f else f[f"{w}_a"] @ f[f"{w}_b"] for w in ("lokr_w1", "lokr_w2"))
        product = torch.kron(w1.contiguous(), w2.contiguous())
    return product * scale(factors)


def rank(factors: Mapping[str, Tensor]) -> int | None:
    """Inner size of what is stored as a product; None when the factors are full matrices."""
    return next((factors[n].shape[0] for n in ("lora_down.weight", "lokr_w2_b", "lokr_w1_b") if n in factors), None)


def scale(factors: Mapping[str, Tensor]) -> float:
    """alpha / rank of a layer stored as a product, 1 without one or without an alpha."""
    inner = rank(factors)
    return float(factors["alpha"]) / inner if inner and "alpha" in factors else 1.0


@torch.no_grad()
def merge(net: nn.Module, modules: dict[str, nn.Module]) -> None:
    """Add every adapter's delta into the dense linear it sits on: float32 sum, rounded once to the weight's dtype.

    modules: linear name -> LyCORIS module. Raises ValueError for a quantized linear, whose codes would swallow
    most of a small delta: merge into the unquantized base and quantize again.
    """
    linears = {name: net.get_submodule(name) for name in modules}
    for name, linear in linears.items():
        if type(linear) is not nn.Linear:
            raise ValueError(f"'{name}' is a {type(linear).__name__}; merge into the unquantized base instead")
    for name, linear in linears.items():
        linear.weight.copy_(linear.weight.float() + delta(modules[name]))
