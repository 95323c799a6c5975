"""What cards run as one kernel, and torch on "meta" as many: shapes and autograd of such operations, and no numbers.

Installed by ``card_kernels`` for as long as a step runs on paper. Each stands for a kernel of torch's CUDA build or of ours.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn
from unittest.mock import patch

import torch
from torch import Tensor
from torch.library import custom_op
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function

from dedistill.adapters import layers
from dedistill.kernels import Saved
from dedistill.models import offload, products, quantize
from dedistill.training.optim import KahanAdamW

aten = torch.ops.aten

# --- attention -------------------------------------------------------------------------------------------------------


_in_pieces = F.scaled_dot_product_attention


def attention_of_cards(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: object) -> Tensor:
    """Flash, or with a mask the memory-efficient kernel; products and a softmax where heads have no dimension of their own."""
    if has_torch_function((query, key, value)):  # autocast's
        return handle_torch_function(attention_of_cards, (query, key, value), query, key, value, attn_mask)
    if query.dim() != 4:
        return _in_pieces(query, key, value, attn_mask)
    if attn_mask is None:
        return aten._scaled_dot_product_flash_attention(query, key, value)[0]
    bias = _bias(attn_mask, query).expand(*query.shape[:-1], key.shape[-2])
    return aten._scaled_dot_product_efficient_attention(query, key, value, bias, compute_log_sumexp=True)[0]


def attention_of_cpus(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: object) -> Tensor:
    if has_torch_function((query, key, value)):
        return handle_torch_function(attention_of_cpus, (query, key, value), query, key, value, attn_mask)
    if query.dim() != 4:
        return _in_pieces(query, key, value, attn_mask)
    bias = None if attn_mask is None else _bias(attn_mask, query)
    return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, attn_mask=bias)[0]


def _bias(mask: Tensor, query: Tensor) -> Tensor:
    """What torch makes of a mask: numbers to be added."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill(mask.logical_not(), float("-inf"))


# --- RMSNorm ---------------------------------------------------------------------------------------------------------


def _never() -> NoReturn:
    raise NotImplementedError("shapes alone")


@custom_op("dedistill::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    _never()


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)


@custom_op("dedistill::rms_norm_backward", mutates_args=())
def _rms_norm_backward(grad: Tensor, x: Tensor, scale: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    _never()


@_rms_norm_backward.register_fake
def _(grad: Tensor, x: Tensor, scale: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Saved, x: Tensor, weight: Tensor) -> Tensor:
        y, scale = _rms_norm(x, weight)
        ctx.save_for_backward(x, scale, weight)
        return y

    @staticmethod
    def backward(ctx: Saved, grad: Tensor) -> tuple[Tensor, Tensor]:
        return _rms_norm_backward(grad, *ctx.saved_tensors)


_torch_rms_norm = torch.rms_norm


def rms_norm(x: Tensor, shape: list[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    if weight is not None and weight.dtype != x.dtype:  # as under autocast
        return _torch_rms_norm(x, shape, weight, eps)
    return _RmsNorm.apply(x, x.new_empty(shape) if weight is None else weight)


# --- kernels of ours -------------------------------------------------------------------------------------------------


@custom_op("dedistill::add_mixed", mutates_args=())
def _add_mixed(base: Tensor, first: Tensor, groups: Tensor) -> Tensor:
    _never()


@_add_mixed.register_fake
def _(base: Tensor, first: Tensor, groups: Tensor) -> Tensor:
    return torch.empty_like(base)


@custom_op("dedistill::add_mixed_backward", mutates_args=())
def _add_mixed_backward(grad: Tensor, first: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    _never()


@_add_mixed_backward.register_fake
def _(grad: Tensor, first: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(first), torch.empty_like(groups)


class _AddMixed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Saved, base: Tensor, first: Tensor, groups: Tensor) -> Tensor:
        ctx.save_for_backward(first, groups)
        return _add_mixed(base, first, groups)

    @staticmethod
    def backward(ctx: Saved, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return grad, *_add_mixed_backward(grad, *ctx.saved_tensors)


_torch_add_mixed = layers.add_mixed


def add_mixed(base: Tensor, first: Tensor, groups: Tensor) -> Tensor:
    if base.dtype != torch.bfloat16 or max(first.shape) > 16:
        return _torch_add_mixed(base, first, groups)
    return _AddMixed.apply(base, first, groups)


@custom_op("dedistill::quantize_tokens", mutates_args=())
def _quantize_tokens(x: Tensor, factor: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    _never()


@_quantize_tokens.register_fake
def _(x: Tensor, factor: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, dtype=dtype), x.new_empty(len(x), 1, dtype=torch.float32)


def quantize_tokens(x: Tensor, factor: Tensor | None = None, format: products.Format = products.INT8) -> tuple[Tensor, Tensor]:
    return _quantize_tokens(x, factor, format.codes)


@custom_op("dedistill::dequantize", mutates_args=())
def _dequantize(stored: Tensor, scale: Tensor) -> Tensor:
    _never()


@_dequantize.register_fake
def _(stored: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(stored, dtype=scale.dtype)


def dequantized(stored: Tensor, scale: Tensor, *, again: bool = False) -> Tensor:
    return _dequantize(stored, scale)


@custom_op("dedistill::scaled_product", mutates_args=())
def _scaled_product(
    a: Tensor, b: Tensor, rows: Tensor, columns: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    _never()


@_scaled_product.register_fake
def _(a: Tensor, b: Tensor, rows: Tensor, columns: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return a.new_empty(len(a), b.shape[1], dtype=dtype)


def scaled_product(
    a: Tensor, b: Tensor, rows: Tensor, columns: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return _scaled_product(a, b, rows, columns, bias, dtype)


@custom_op("dedistill::kahan", mutates_args=("tensors",))
def _kahan(tensors: list[Tensor]) -> None:
    _never()


@_kahan.register_fake
def _(tensors: list[Tensor]) -> None:
    return None


def kahan_step(optimizer: KahanAdamW, closure: object = None, param: object = None) -> None:
    """``KahanAdamW._step_at_once``: one kernel for each group."""
    for group in optimizer.param_groups:
        lists: tuple[list[Tensor], ...] = ([], [], [], [], [])
        optimizer._init_group(group, *lists)
        group["step"] += 1
        _kahan([tensor for tensors in lists for tensor in tensors])


# --- what waits in the memory of the CPU -----------------------------------------------------------------------------


class Elsewhere:
    """``offload.Away`` on a card: nothing of it is there."""

    def __init__(self, tensor: Tensor):
        self.shape, self.dtype = tensor.shape, tensor.dtype

    def back(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


class Here:
    """The same on a CPU: a copy, from which another is made."""

    def __init__(self, tensor: Tensor):
        self.kept = tensor.clone()

    def back(self) -> Tensor:
        return self.kept.clone()


@contextmanager
def card_kernels() -> Iterator[None]:
    """While it is open, what runs takes a card's kernels."""
    with (
        patch.object(F, "scaled_dot_product_attention", attention_of_cards),
        patch.object(torch, "rms_norm", rms_norm),
        patch.object(layers, "add_mixed", add_mixed),
        patch.object(quantize, "dequantized", dequantized),
        patch.object(products, "quantize_tokens", quantize_tokens),
        patch.object(products, "scaled_product", scaled_product),
        patch.object(KahanAdamW, "step", kahan_step),
        patch.object(offload, "Away", Elsewhere),
    ):
        yield


@contextmanager
def cpu_kernels() -> Iterator[None]:
    with patch.object(F, "scaled_dot_product_attention", attention_of_cpus), patch.object(offload, "Away", Here):
        yield
