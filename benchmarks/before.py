"""The training step as it was done before, or would be by others: one part at a time."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType

import torch
from lycoris.modules.locon import LoConModule
from lycoris.modules.lokr import LokrModule
from torch import Tensor

from benchmarks.gpu import Setup
from dedistill import kernels
from dedistill.adapters import layers
from dedistill.adapters.layers import LokrLayer, LoraLayer
from dedistill.models import quantize as int8
from dedistill.models.model import Model


@contextmanager
def swapped(owner: object, name: str, value: object) -> Iterator[None]:
    old = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, old)


# --- how it was done before, or would be by others -------------------------------------------------------------------


def autocast(setup: Setup) -> object:
    """torch chooses the dtype of each operation."""

    def velocity(model: Model, *args: object) -> Tensor:
        with torch.autocast(model.device.type, torch.bfloat16):
            return plain(model, *args)

    plain, linear = Model.velocity, int8.QuantizedLinear.forward
    stack = ExitStack()
    stack.enter_context(swapped(int8.QuantizedLinear, "forward", lambda module, x: linear(module, x.to(torch.bfloat16))))
    relink(setup)
    stack.callback(relink, setup)
    stack.enter_context(swapped(Model, "velocity", velocity))
    return stack


@contextmanager
def lycoris(setup: Setup) -> Iterator[None]:
    """LyCORIS' own forward, its plain torch code."""
    with swapped(LokrLayer, "forward", LokrModule.forward), swapped(LoraLayer, "forward", LoConModule.forward):
        for module in setup.model.adapter.by_target.values():
            module.org_module[0].forward = module.forward
        yield
    for module in setup.model.adapter.by_target.values():
        module.org_module[0].forward = module.forward


def dequantized_by_torch(setup: Setup) -> object:
    """Codes and scales multiplied by torch."""
    return swapped(int8, "dequantized", lambda codes, scale, **_: codes * scale)


def mixed_by_torch(setup: Setup) -> object:
    """The small factor of a LoKr as a matrix product."""

    def add_mixed(base: Tensor, first: Tensor, groups: Tensor) -> Tensor:
        return base + torch.matmul(first.expand(*groups.shape[:-2], *first.shape), groups)

    return swapped(layers, "add_mixed", add_mixed)


@contextmanager
def all_of_these(setup: Setup) -> Iterator[None]:
    with autocast(setup), lycoris(setup), swapped(kernels, "proven", set()):
        yield


OFF: dict[str, Callable[[Setup], object]] = {
    "LyCORIS' forward": lycoris,
    "codes and scales multiplied by torch": dequantized_by_torch,
    "small factor as a matrix product": mixed_by_torch,
    "all of these, autocast, and the optimizer tensor by tensor": all_of_these,
}


def relink(setup: Setup) -> None:
    """Adapters keep the forward they found."""
    for module in setup.model.adapter.by_target.values():
        module.org_forward = MethodType(type(module.org_module[0]).forward, module.org_module[0])
