"""Put adapters on a frozen network, and take their tensors out and in by name."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from lycoris.modules.base import LycorisBaseModule
from torch import Tensor, nn

from dedistill.adapters.layers import LokrConv, LokrLayer, LoraConv, LoraLayer
from dedistill.adapters.targets import Resolved, Shape
from dedistill.errors import UserError


def file_name(module_name: str) -> str:
    """``a.b.c`` as LyCORIS, SimpleTuner and ComfyUI spell it in files: ``lycoris_a_b_c``."""
    return "lycoris_" + module_name.replace(".", "_")


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


def adaptable(denoiser: nn.Module) -> dict[str, Shape]:
    """name -> shape of its dense weight, of every layer that can have an adapter, in the network's order: linears, quantized
    or not, and convolutions whose channels all see each other."""
    found: dict[str, Shape] = {}
    for name, layer in denoiser.named_modules():
        if isinstance(layer, nn.Linear):
            found[name] = (layer.out_features, layer.in_features)
        elif isinstance(layer, nn.Conv2d) and layer.groups == 1:
            found[name] = (layer.out_channels, layer.in_channels, *layer.kernel_size)
    return found
