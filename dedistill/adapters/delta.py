"""The weight change an adapter stands for: one formula for all; and how an adapter starts."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from lycoris.modules.base import LycorisBaseModule
from lycoris.modules.lokr import LokrModule
from torch import Tensor, nn

from dedistill.errors import UserError, amount
from dedistill.flow import keyed

# --- the weight change an adapter stands for -------------------------------------------------------------------------


def delta(module: LycorisBaseModule) -> Tensor:
    """The change of weight, as of :func:`weight_change`, of one LyCORIS LoKr or LoRA module."""
    return weight_change({**dict(module.named_parameters()), "alpha": module.alpha})


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


@torch.no_grad()
def merge(denoiser: nn.Module, modules: Mapping[str, LycorisBaseModule]) -> None:
    """Add every adapter's delta into the dense layer it sits on: float32 sum, rounded once to the weight's dtype.

    modules: layer name -> LyCORIS module. Raises ValueError for a quantized linear, whose codes would swallow
    most of a small delta: merge into the unquantized base and quantize again.
    """
    layers: dict[str, nn.Linear | nn.Conv2d] = {}
    for name in modules:
        layer = denoiser.get_submodule(name)
        if not isinstance(layer, nn.Linear | nn.Conv2d) or type(layer) not in (nn.Linear, nn.Conv2d):
            raise ValueError(f"'{name}' is a {type(layer).__name__}; merge into the unquantized base instead")
        layers[name] = layer
    for name, layer in layers.items():
        layer.weight.copy_(layer.weight.float() + delta(modules[name]).view_as(layer.weight))


# --- how an adapter starts, and the check that it really started so --------------------------------------------------


TOLERANCE = 0.01
"""Relative error allowed between the size an initialisation asked for and the size found afterwards."""


@torch.no_grad()
def initialise(
    module: LycorisBaseModule, name: str, weight: Callable[[], Tensor], *, init: str, scale: float | None, seed: int
) -> None:
    """Set the factors of one LyCORIS module, a function of (seed, name) alone.

    default: LyCORIS' own start, delta 0. ones: w1 = 1 and delta 0. perturbed_normal: w1 = 1 and the second factor
    normal with ``scale`` times the mean and deviation of the layer's dense ``weight()`` (jimmycarter's LibreFLUX).
    A decomposed factor, and LoRA, get normal factors whose product has that deviation and mean 0.
    """
    rng = keyed.generator(seed, f"adapter-init/{name}")
    lokr = isinstance(module, LokrModule)
    # the two factors of whatever is decomposed; the right one stays 0 unless perturbed
    pair = None if lokr and module.use_w2 else _factors(module)
    if init == "default":
        for first in ([module.lokr_w1] if lokr else []) + ([pair[0 if lokr else 1]] if pair else []):
            bound = first[0].numel() ** -0.5  # kaiming_uniform(a = sqrt 5)
            first.copy_(torch.from_numpy(rng.uniform(-bound, bound, tuple(first.shape)).astype("float32")))
        return
    if lokr:
        module.lokr_w1.fill_(1.0)
    if init == "perturbed_normal" and pair is None:
        dense, draw = weight(), _normal(rng, module.lokr_w2)
        draw = (draw - draw.mean()) / draw.std(correction=0) * _deviation(dense) + float(dense.mean())
        module.lokr_w2.copy_(draw * (scale or 0.0))
    elif pair and init == "perturbed_normal" and (deviation := _deviation(weight())) > 0:
        left, right = pair
        a, b = _normal(rng, left), _normal(rng, right)
        size = (scale or 0.0) * deviation / (_deviation(a.flatten(1) @ b.flatten(1)) * module.scale)
        left.copy_(a * size**0.5)
        right.copy_(b * size**0.5)
    elif pair:  # ones, or a layer of equal weights, which have no deviation to take a share of
        left, _ = pair
        left.copy_(_normal(rng, left) * left.shape[1] ** -0.5)


def _factors(module: LycorisBaseModule) -> tuple[Tensor, Tensor]:
    if isinstance(module, LokrModule):
        return module.lokr_w2_a, module.lokr_w2_b
    return module.lora_up.weight, module.lora_down.weight


def _deviation(values: Tensor) -> float:
    """Taken where the values lie: full-size weights need not leave the GPU."""
    return float(values.std(correction=0))


def _normal(rng: np.random.Generator, like: Tensor) -> Tensor:
    return torch.from_numpy(rng.standard_normal(tuple(like.shape), dtype="float32"))


@torch.no_grad()
def check_started(
    modules: Mapping[str, LycorisBaseModule], weight: Callable[[str], Tensor], *, init: str, scale: float | None
) -> dict[str, float]:
    """Deviation of each layer's delta relative to its weight's; raises UserError where it is not what was asked for.

    A trainer that drops its initialisation silently can train for weeks before anyone sees it (LibreFLUX did).
    """
    wanted = (scale or 0.0) if init == "perturbed_normal" else 0.0
    sizes = {name: (_deviation(delta(m)), _deviation(weight(name))) for name, m in modules.items()}
    found = {name: d / w if w else d for name, (d, w) in sizes.items()}
    # "not within" also catches NaN
    wrong = [n for n, (d, w) in sizes.items() if not abs(d - wanted * w) <= (TOLERANCE + _rounding(modules[n])) * wanted * w]
    wrong += [n for n, m in modules.items() if init != "default" and isinstance(m, LokrModule) and (m.lokr_w1 != 1).any()]
    if wrong:
        raise UserError(
            f"adapter.init: '{init}' did not take effect in {len(set(wrong))} of {amount(len(modules), 'layer')}, "
            f"e.g. {wrong[0]}: "
            f"deviation of the delta is {found[wrong[0]]:.3g} of the weight's, {wanted:.3g} was asked for"
        )
    # a factor's gradient is the product of the others: with two of them 0, none ever moves
    if dead := [n for n, m in modules.items() if sum(not p.any() for p in m.parameters()) > 1]:
        raise UserError(
            f"adapter.init: '{init}' left two factors of {len(dead)} of {amount(len(modules), 'layer')} at zero, "
            f"e.g. {dead[0]}: "
            "nothing there would ever train"
        )
    return found


def _rounding(module: LycorisBaseModule) -> float:
    """Relative rounding of one stored number: bf16 factors carry 8 bits."""
    return 0.0 if next(module.parameters()).dtype == torch.float32 else 2.0**-8
