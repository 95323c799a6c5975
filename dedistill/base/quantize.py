"""Freeze and quantize a network's linears by exact name."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dedistill.base.int8 import Int8Linear
from dedistill.errors import UserError
from dedistill.patterns import matching
from dedistill.tensorfile import tensors_sha256


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
