"""Freeze a network and store its linears in fewer bits, by exact name. A way of storing is a class, named in ``QUANTIZERS``.

Tensor subclasses (quanto, torchao) break under DDP, FSDP2, ZeRO-3, deepcopy or safetensors, each in its own way; two
ordinary frozen parameters work everywhere. Codes are symmetric, with one scale per output row; those of int8 equal
optimum-quanto's qint8.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dedistill.kernels as kernels
from dedistill.adapters.targets import matching
from dedistill.errors import UserError
from dedistill.io.safetensors import tensors_sha256
from dedistill.models.products import FORMAT_OF, FORMATS, FP8, INT8, CodeProducts, Format, check_products, encoded, fits
from dedistill.models.swap import move_rest
from dedistill.recipe import Recipe

# --- a linear made of plain tensors ----------------------------------------------------------------------------------


def quantize_rows(weight: Tensor, format: Format = INT8) -> tuple[Tensor, Tensor]:
    """Codes [out, in], as they are stored, and scale [out, 1] of ``weight`` [out, in], in its own dtype as quanto does."""
    scale = weight.abs().amax(1, keepdim=True) / format.largest
    return encoded(weight / torch.where(scale == 0, 1, scale), format).view(format.stored), scale


def dequantized(stored: Tensor, scale: Tensor, *, again: bool = False) -> Tensor:
    """Codes [out, in] times scale [out, 1], in the scale's dtype. again: in backward, which keeps nothing of forward's."""
    format = FORMAT_OF[stored.dtype]
    codes = stored.view(format.codes)
    ours = (codes.device, "codes") in kernels.proven and (format is INT8 or kernels.has_fp8(codes.device))
    if ours and not torch.compiler.is_compiling():
        from dedistill.kernels.codes import dequantize

        return dequantize(codes, scale)
    # a compiler would take equal terms of both passes for one, and keep it between them: twice what the base takes
    if format is FP8:  # torch multiplies no fp8 with other types; float16 holds all of its numbers
        apart = again and torch.compiler.is_compiling()
        return scale * codes.half().to(scale.dtype) if apart else codes.to(scale.dtype).mul_(scale)
    # one kernel that converts as it reads, with the bits of converting first
    return scale * codes if again else codes * scale


class _FloatMatmul(torch.autograd.Function):
    """y = x W^T + b with W = codes * scale rebuilt in both passes: nothing weight-sized is kept for backward."""

    @staticmethod
    def forward(ctx: kernels.Saved, x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(codes, scale)
        return F.linear(x, dequantized(codes, scale.to(x.dtype)), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: kernels.Saved, grad: Tensor) -> tuple[Tensor, None, None, None]:
        codes, scale = ctx.saved_tensors
        return grad @ dequantized(codes, scale.to(grad.dtype), again=True), None, None, None


class QuantizedLinear(nn.Linear):
    """A frozen ``nn.Linear``: weight [out, in] int8, or uint8 with the bits of e4m3, and weight_scale [out, 1]; gradients flow
    to the input only."""

    products = False
    """Whether sequences of tokens are multiplied as codes, too. Single vectors, of which there are few, never are."""

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None):
        """From what :func:`quantize_rows` gave, or a file holds."""
        super().__init__(codes.shape[1], codes.shape[0], bias is not None, device="meta")
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=False)

    @classmethod
    def of(cls, linear: nn.Linear, format: Format = INT8) -> "QuantizedLinear":
        """``linear`` quantized; its bias is copied."""
        bias = None if linear.bias is None else linear.bias.detach().clone()
        return cls(*quantize_rows(linear.weight.detach(), format), bias)

    def forward(self, x: Tensor) -> Tensor:
        matmul = CodeProducts if self.products and x.dim() > 2 else _FloatMatmul
        return matmul.apply(x, self.weight, self.weight_scale, self.bias)

    def dequantized(self) -> Tensor:
        """The weight it stands for, [out, in], in the scale's dtype."""
        return dequantized(self.weight, self.weight_scale)


# --- ways of storing a frozen linear ---------------------------------------------------------------------------------


class Quantizer(ABC):
    """A way of storing frozen linears, and of reading them again."""

    refused: ClassVar[Mapping[str, str]] = {}
    """Engines it does not work with -> why, and what to use instead."""

    @abstractmethod
    def convert(self, linear: nn.Linear) -> nn.Linear:
        """What takes the place of ``linear``, on its device; ``linear`` itself is not used any more."""

    @abstractmethod
    def made(self, module: nn.Module) -> bool:
        """Whether ``module`` comes of :meth:`convert`, or of a file that holds such."""

    @abstractmethod
    def dense(self, linear: nn.Linear) -> Tensor:
        """The weight that a linear made by it stands for, [out, in], in any float type."""

    def stored(self, linear: nn.Linear) -> dict[str, Tensor]:
        """The plain tensors that a linear made by it really holds, by names within it."""
        return dict([*linear.named_parameters(), *linear.named_buffers()])


class Codes(Quantizer):
    """Ours: :class:`QuantizedLinear`."""

    def __init__(self, format: Format):
        self.format = format

    def convert(self, linear: nn.Linear) -> nn.Linear:
        return QuantizedLinear.of(linear, self.format)

    def made(self, module: nn.Module) -> bool:
        return isinstance(module, QuantizedLinear) and FORMAT_OF[module.weight.dtype] is self.format

    def dense(self, linear: nn.Linear) -> Tensor:
        return cast(QuantizedLinear, linear).dequantized()


class QuantoInt8(Quantizer):
    """The same codes as optimum-quanto keeps them: a subclass of tensors."""

    refused: ClassVar = {
        "fsdp2": "would be sharded as the floats it stands for, without a word; use 'int8' (the same codes)",
        "zero3": "breaks when ZeRO-3 cuts it; use 'int8' (the same codes)",
    }

    def convert(self, linear: nn.Linear) -> nn.Linear:
        from optimum.quanto import freeze, qint8, quantize

        holder = nn.Sequential(linear)
        quantize(holder, weights=qint8)
        freeze(holder)
        return cast(nn.Linear, holder[0])

    def made(self, module: nn.Module) -> bool:
        return hasattr(module, "weight_qtype")

    def dense(self, linear: nn.Linear) -> Tensor:
        return linear.weight.detach().dequantize()

    def stored(self, linear: nn.Linear) -> dict[str, Tensor]:
        tensors = super().stored(linear)
        weight: Any = tensors.pop("weight")  # their tensor, whose parts have no public names
        return {"weight.data": weight._data, "weight.scale": weight._scale, **tensors}


QUANTIZERS: dict[str, Quantizer | None] = {
    "none": None,
    "int8": Codes(INT8),
    "int8-quanto": QuantoInt8(),
    "fp8": Codes(FP8),
}
"""By the names that recipes use; None leaves linears as they are."""


def check_engine(recipe: Recipe, engine: str, otherwise: str) -> None:
    """Raises UserError where the recipe's base cannot be stored as it says under ``engine``. otherwise: what else to use."""
    quantizer = QUANTIZERS[recipe.base.quant]
    if quantizer and (why := quantizer.refused.get(engine)):
        raise UserError(f"{recipe.where('base.quant')}: '{recipe.base.quant}' {why}, or {otherwise}", exit_code=2)


def _quantizer_of(module: nn.Module) -> Quantizer | None:
    return next((q for q in QUANTIZERS.values() if q and q.made(module)), None)


# --- freeze and quantize a network's linears by exact name -----------------------------------------------------------


def linear_names(denoiser: nn.Module) -> list[str]:
    """Names of every linear, quantized or not."""
    return [name for name, module in denoiser.named_modules() if isinstance(module, nn.Linear)]


def prepare_base(
    denoiser: nn.Module,
    quant: str,
    exclude: list[str],
    device: torch.device | str,
    where: Callable[[str], str] = str,
    stay: Sequence[nn.Module] = (),
) -> list[str]:
    """Quantize ``denoiser`` in place, move it to ``device``, freeze all of it; returns the names of the quantized linears.

    quant: a name of ``QUANTIZERS``. A linear that matches a pattern of ``exclude`` keeps its dtype. stay: blocks whose
    parameters do not move: their linears are quantized on ``device`` and come back.
    Raises UserError for a pattern that matches no linear.
    """
    kernels.prove(device)
    names = linear_names(denoiser)
    kept = excluded(exclude, names, where)
    quantizer = QUANTIZERS[quant]
    chosen: list[str] = []
    if quantizer:
        chosen = [name for name in names if name not in kept]
        staying = {module for block in stay for module in block.modules()}
        for name in chosen:  # one at a time, so that the whole dense network is never on the device
            linear = cast(nn.Linear, denoiser.get_submodule(name))  # quantized ones have its sizes
            before = linear.weight.device
            made = quantizer.convert(linear.to(device))
            denoiser.set_submodule(name, made.to(before) if linear in staying else made)
    move_rest(denoiser, device, stay)
    # after quantization: quanto's freeze() makes the weights it rebuilds require gradients again
    denoiser.requires_grad_(False)
    return chosen


def multiply_codes(
    denoiser: nn.Module, blocks: Sequence[nn.Module], device: torch.device | str, where: str, quant: str = "int8"
) -> list[str]:
    """Have the linears of ``blocks``, stored as ``quant``, multiply sequences as codes; returns the names of those that can.
    Raises UserError, naming ``where``, where none can.

    Layers before and after the blocks are a small part of the work, and what is rounded there goes into every output.
    """
    format = FORMATS[quant]
    check_products(device, where, format, float_dtype(denoiser))
    inside = {module for block in blocks for module in block.modules()}
    linears = ((name, m) for name, m in denoiser.named_modules() if m in inside and isinstance(m, QuantizedLinear))
    chosen = {name: linear for name, linear in linears if fits(linear)}
    if not chosen:
        sides = f"no linear of this network's blocks has sides that are multiples of {format.multiple}"
        raise UserError(f"{where}: {sides}; use 'float'", exit_code=2)
    for linear in chosen.values():
        linear.products = True
    return list(chosen)


def dense_weight(layer: nn.Module) -> Tensor:
    """The weight that a linear or a convolution stands for, dequantized, float32, whatever its storage."""
    quantizer = _quantizer_of(layer)
    return (quantizer.dense(cast(nn.Linear, layer)) if quantizer else cast(nn.Linear, layer).weight.detach()).float()


def excluded(patterns: list[str], names: list[str], where: Callable[[str], str] = str) -> set[str]:
    """The ``names`` that a pattern matches. Raises UserError for a pattern that matches none."""
    return {name for i, pattern in enumerate(patterns) for name in _excluded(pattern, names, where(f"base.exclude.{i}"))}


def _excluded(pattern: str, names: list[str], where: str) -> list[str]:
    try:
        found = matching(pattern, names)
    except ValueError as e:
        raise UserError(f"{where}: {e}", exit_code=2) from e
    if not found:
        raise UserError(
            f"{where}: '{pattern}' matches no linear of the network (a container's name is not enough: "
            f"write '**.norm1.linear', not '*.norm1'); some names: {', '.join(names[:3])} ...",
            exit_code=2,
        )
    return found


def storage_bytes(denoiser: nn.Module) -> int:
    """Bytes that parameters and buffers really occupy (quanto reports the size its weights would have in float)."""
    return sum(part.numel() * part.element_size() for part in _stored(denoiser).values())


def sample_sha256(denoiser: nn.Module, tensors: int = 64, elements: int = 1024) -> str:
    """Hash of the first ``elements`` of ``tensors`` of the stored tensors, evenly chosen: tells two bases apart at once."""
    stored = sorted(_stored(denoiser).items())
    chosen = stored[:: max(1, len(stored) // tensors)]
    return tensors_sha256({name: part.reshape(-1)[:elements] for name, part in chosen})


def _stored(denoiser: nn.Module) -> dict[str, Tensor]:
    """The tensors that hold a network's numbers, as they are stored."""
    parts = dict([*denoiser.named_parameters(), *denoiser.named_buffers()])
    for name, module in denoiser.named_modules():
        if quantizer := _quantizer_of(module):
            for own, _ in [*module.named_parameters(), *module.named_buffers()]:
                del parts[f"{name}.{own}"]
            parts |= {f"{name}.{own}": tensor for own, tensor in quantizer.stored(cast(nn.Linear, module)).items()}
    return parts


def float_dtype(module: nn.Module) -> torch.dtype:
    """What ``module`` computes in: the dtype of its first parameter that is not made of codes."""
    return next(p.dtype for p in module.parameters() if p.is_floating_point())


def cast_float(denoiser: nn.Module, dtype: torch.dtype) -> None:
    """Store the frozen floating-point weights in ``dtype``. Before quantization, so that scales follow."""
    for parameter in denoiser.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
