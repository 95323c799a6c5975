"""Put adapters on a frozen network, start them, and take their tensors out and in by name."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from lycoris.modules.base import LycorisBaseModule
from lycoris.modules.lokr import LokrModule
from torch import Tensor, nn

from dedistill.adapters.delta import weight_change
from dedistill.adapters.layers import LokrConv, LokrLayer, LoraConv, LoraLayer
from dedistill.adapters.naming import file_name
from dedistill.adapters.targets import Resolved
from dedistill.errors import UserError, amount
from dedistill.flow import keyed


class Adapter(nn.Module):
    """The trained part: one LyCORIS module per target, in bypass mode, named as in files.

    The network that it is attached to is no part of it: nothing of the frozen base is broadcast, saved or optimized with it.
    """

    def __init__(self, denoiser: nn.Module, kind: str, targets: list[Resolved]):
        super().__init__()
        self.by_target: dict[str, LycorisBaseModule] = {}
        self.shapes: dict[str, dict[str, tuple[int, ...]]] = {}
        """Of each target's parameters. An engine may cut the parameters themselves."""
        for target in targets:
            module = _build(kind, target, denoiser.get_submodule(target.name))
            module.apply_to()
            self.add_module(file_name(target.name), module)
            self.by_target[target.name] = module
            self.shapes[target.name] = {name: tuple(p.shape) for name, p in module.named_parameters()}

    @contextmanager
    def at_strength(self, strength: float) -> Iterator[None]:
        """While this lasts, what it adds is multiplied by ``strength``."""
        modules = [*self.by_target.values()]
        own = [module.multiplier for module in modules]
        for module in modules:
            module.multiplier = strength
        try:
            yield
        finally:
            for module, multiplier in zip(modules, own):
                module.multiplier = multiplier

    def detach_from_base(self) -> None:
        """Give the network its own forward back, bit for bit."""
        for module in self.by_target.values():
            module.restore()

    def trainable(self) -> dict[str, nn.Parameter]:
        """Parameters under their names in files."""
        return dict(self.named_parameters())

    def alphas(self) -> dict[str, Tensor]:
        """Each module's alpha under its name in files."""
        return {f"{file_name(n)}.alpha": m.alpha for n, m in self.by_target.items()}

    def tensors(self, *, copy: bool = True) -> dict[str, Tensor]:
        """Everything a file holds: parameters and each module's alpha; private copies on the CPU, or as they stand."""
        return detached(self.trainable() | self.alphas(), copy=copy)

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, Tensor], source: str) -> None:
        """Copy a whole file in. Raises UserError, changing nothing, unless names, shapes and alphas agree exactly."""
        alphas = self.alphas()
        own = self.trainable()
        problems = compare_tensors(own | alphas, tensors) or _other_alphas(alphas, tensors)
        if problems:
            raise UserError(f"'{source}' does not fit this recipe's adapter: {problems}")
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def detached(tensors: Mapping[str, Tensor], *, copy: bool) -> dict[str, Tensor]:
    """``tensors`` as they stand, or private copies. Copies go to the CPU: no device has room for everything twice."""
    if copy:
        return {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    return {name: t.detach() for name, t in tensors.items()}


def compare_tensors(own: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> str:
    """What keeps ``other`` from being loaded into ``own``; empty when nothing does."""
    missing, extra = sorted(own.keys() - other.keys()), sorted(other.keys() - own.keys())
    shapes = [n for n in own.keys() & other.keys() if own[n].shape != other[n].shape]
    parts = [f"{len(names)} {what}, e.g. {names[0]}" for what, names in (("missing", missing), ("unknown", extra)) if names]
    if shapes:
        n = min(shapes)
        parts.append(f"{len(shapes)} of another shape, e.g. {n} {tuple(other[n].shape)}, expected {tuple(own[n].shape)}")
    return "; ".join(parts)


def _other_alphas(own: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> str:
    """What alphas of a file would be scaled by another amount here; empty when they agree."""
    differing = [name for name in own if float(own[name]) != float(other[name])]
    if not differing:
        return ""
    name = differing[0]
    return f"{len(differing)} of another scale, e.g. {name} {float(other[name]):g}, expected {float(own[name]):g}"


def _build(kind: str, target: Resolved, layer: nn.Module) -> LycorisBaseModule:
    # alpha = rank: the scale is 1 in every program that reads the file
    name = file_name(target.name)
    rank = target.rank or 1
    convolution = isinstance(layer, nn.Conv2d)
    if kind == "lora":
        return (LoraConv if convolution else LoraLayer)(name, layer, 1.0, rank, rank, bypass_mode=True)
    lokr, full = LokrConv if convolution else LokrLayer, target.rank is None
    return lokr(name, layer, 1.0, rank, rank, factor=target.factor, full_matrix=full, bypass_mode=True)


# --- how an adapter starts, and the check that it really started so --------------------------------------------------


TOLERANCE = 0.01
"""Relative error allowed between the size an initialisation asked for and the size found afterwards."""


def delta(module: LycorisBaseModule) -> Tensor:
    """The change of weight, as of :func:`weight_change`, of one LyCORIS LoKr or LoRA module."""
    return weight_change({**dict(module.named_parameters()), "alpha": module.alpha})


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
