"""The weight change that factors of an adapter stand for: one formula for all."""

from collections.abc import Mapping

import torch
from torch import Tensor


def weight_change(factors: Mapping[str, Tensor]) -> Tensor:
    """The change of weight, float32, that one layer's ``factors`` stand for, named as LyCORIS names them: [out, in] of a
    linear, [out, in h w] of a convolution.

    LoKr: lokr_w1 (x) lokr_w2, each alone or as a product _a _b, of which ``rows`` may take some; LoRA: lora_up.weight
    lora_down.weight; diff: the change itself. What is a product is scaled by alpha / rank, once; a LoKr of two full factors
    has no rank, so its alpha means nothing. LyCORIS' own ``get_diff_weight`` applies that scale twice (4.1.3), hence not used.
    """
    f = {name: tensor.float().flatten(1) if tensor.ndim > 2 else tensor.float() for name, tensor in factors.items()}
    if "diff" in f:
        return f["diff"]
    if "lora_up.weight" in f:
        product = f["lora_up.weight"] @ f["lora_down.weight"]
    else:
        w1, w2 = (f[w] if w in f else f[f"{w}_a"] @ f[f"{w}_b"] for w in ("lokr_w1", "lokr_w2"))
        product = torch.kron(w1.contiguous(), w2.contiguous())
        if "rows" in factors:
            product = torch.cat([product[start:stop] for start, stop in factors["rows"].tolist()])
    return product * scale(factors)


def rank(factors: Mapping[str, Tensor]) -> int | None:
    """Inner size of what is stored as a product; None when the factors are full matrices."""
    return next((factors[n].shape[0] for n in ("lora_down.weight", "lokr_w2_b", "lokr_w1_b") if n in factors), None)


def scale(factors: Mapping[str, Tensor]) -> float:
    """alpha / rank of a layer stored as a product, 1 without one or without an alpha."""
    inner = rank(factors)
    return float(factors["alpha"]) / inner if inner and "alpha" in factors else 1.0
