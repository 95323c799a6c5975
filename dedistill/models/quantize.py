"""Freeze a network and store its linears in fewer bits, by exact name.

Tensor subclasses (quanto, torchao) break under DDP, FSDP2, ZeRO-3, deepcopy or safetensors, each in its own way; two
ordinary frozen parameters work everywhere. The codes equal optimum-quanto's qint8: symmetric, one scale per output row.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dedistill.adapters.targets import matching
from dedistill.errors import UserError
from dedistill.io.safetensors import tensors_sha256

# --- an int8 linear made of plain tensors ----------------------------------------------------------------------------


QMAX = 127


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes [out, in] and scale [out, 1] of ``weight`` [out, in], in the weight's own dtype as quanto does."""
    scale = weight.abs().amax(1, keepdim=True) / QMAX
    codes = torch.round(weight / torch.where(scale == 0, 1, scale)).clamp(-QMAX - 1, QMAX)
    return codes.to(torch.int8), scale


class _Int8Matmul(torch.autograd.Function):
    """y = x W^T + b with W = codes * scale rebuilt in both passes: nothing weight-sized is kept for backward."""

    @staticmethod
    def forward(ctx, x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(codes, scale)
        return F.linear(x, codes.to(x.dtype) * scale.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx, grad: Tensor):
        codes, scale = ctx.saved_tensors
        return grad @ (codes.to(grad.dtype) * scale.to(grad.dtype)), None, None, None


class Int8Linear(nn.Linear):
    """A frozen ``nn.Linear``: weight int8 [out, in], weight_scale [out, 1]; gradients flow to the input only."""

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None):
        """From what :func:`quantize_rows` gave, or a file holds."""
        super().__init__(codes.shape[1], codes.shape[0], bias is not None, device="meta")
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=False)

    @classmethod
    def of(cls, linear: nn.Linear) -> "Int8Linear":
        """``linear`` quantized; its bias is copied."""
        bias = None if linear.bias is None else linear.bias.detach().clone()
        return cls(*quantize_rows(linear.weight.detach()), bias)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return _Int8Matmul.apply(x, self.weight, self.weight_scale, self.bias)

    def dequantized(self) -> Tensor:
        """The weight it stands for, [out, in], in the scale's dtype."""
        return self.weight.to(self.weight_scale.dtype) * self.weight_scale


# --- freeze and quantize a network's linears by exact name -----------------------------------------------------------


def linear_names(net: nn.Module) -> list[str]:
    """Names of every linear, quantized or not."""
    return [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]


def prepare_base(
    net: nn.Module, quant: str, exclude: list[str], device: torch.device | str, where: Callable[[str], str] = str
) -> list[str]:
    """Quantize ``net`` in place, move it to ``device``, freeze all of it; returns the names of the quantized linears.

    quant: "none", "int8" (ours) or "int8-quanto". A linear that matches a pattern of ``exclude`` keeps its dtype.
    Raises UserError for a pattern that matches no linear.
    """
    names = linear_names(net)
    kept = excluded(exclude, names, where)
    chosen = [name for name in names if name not in kept] if quant != "none" else []
    if quant == "int8":
        for name in chosen:  # one at a time, so that the whole dense network is never on the device
            net.set_submodule(name, Int8Linear.of(net.get_submodule(name).to(device)))
    elif quant == "int8-quanto":
        _quantize_quanto(net.to(device), chosen)
    elif quant != "none":
        raise ValueError(f"unknown quantization {quant!r}")
    net.to(device)
    # after quantization: quanto's freeze() makes the weights it rebuilds require gradients again
    net.requires_grad_(False)
    return chosen


def dense_weight(linear: nn.Linear) -> Tensor:
    """The weight a linear stands for, dequantized, float32 [out, in], whatever its storage."""
    if isinstance(linear, Int8Linear):
        return linear.dequantized().float()
    weight = linear.weight.detach()
    return (weight.dequantize() if hasattr(weight, "dequantize") and hasattr(weight, "qtype") else weight).float()


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


def _quantize_quanto(net: nn.Module, chosen: list[str]) -> None:
    from optimum.quanto import freeze, qint8, quantize

    quantize(net, weights=qint8, include=chosen)
    freeze(net)


def storage_bytes(net: nn.Module) -> int:
    """Bytes that parameters and buffers really occupy (quanto reports the size its weights would have in float)."""
    return sum(part.numel() * part.element_size() for part in _stored(net).values())


def sample_sha256(net: nn.Module, tensors: int = 64, elements: int = 1024) -> str:
    """Hash of the first ``elements`` of ``tensors`` of the stored tensors, evenly chosen: tells two bases apart at once."""
    stored = sorted(_stored(net).items())
    chosen = stored[:: max(1, len(stored) // tensors)]
    return tensors_sha256({name: part.reshape(-1)[:elements] for name, part in chosen})


def _stored(net: nn.Module) -> dict[str, Tensor]:
    """The tensors that hold a network's numbers, as they are stored."""
    parts = {}
    for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
        if hasattr(tensor, "_data") and hasattr(tensor, "_scale"):
            parts |= {f"{name}.data": tensor._data, f"{name}.scale": tensor._scale}
        else:
            parts[name] = tensor
    return parts


def cast_float(net: nn.Module, dtype: torch.dtype) -> None:
    """Store the frozen floating-point weights in ``dtype``. Before quantization, so that scales follow."""
    for parameter in net.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
