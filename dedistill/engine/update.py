"""One optimizer step after another, where every process holds all gradients and the whole optimizer."""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from dedistill.assemble import Model
from dedistill.engine.gradients import gradients_for
from dedistill.engine.optim import load_optimizer_tensors, make_optimizer, not_finite, optimizer_tensors
from dedistill.recipe import Recipe
from dedistill.recipe.plan import Plan
from dedistill.world import World

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of a number -> the integers that have its bits."""


class Update(Protocol):
    """What the loop asks of an engine. Every method must be called by all processes."""

    optimizer: torch.optim.Optimizer

    def backward(self, loss: Tensor, *, counts: bool) -> None:
        """Add the gradient of ``loss``, the share of one micro-batch in the loss of the step. counts: False for a pass that
        only keeps the others company; such passes come first in a step."""

    def finish(self) -> None:
        """Sum the gradient of the step over its micro-batches and processes."""

    def norm(self) -> float:
        """The norm of the finished gradient, which is clipped as the recipe says."""

    def apply(self, lr: float) -> None:
        """One step of the optimizer. The gradients are gone afterwards."""

    def drop(self) -> None:
        """Forget the gradients; nothing else changes."""

    def spoilt(self) -> list[str]:
        """Tensors of the optimizer that are not finite; the same on every process."""

    def replicas(self) -> dict[str, nn.Parameter]:
        """Trained parameters of which every process holds all, to be compared between them."""

    def bit_sums(self) -> dict[str, int]:
        """A number of each trained parameter that changes with its bits; the same on every process."""

    def whole(self) -> AbstractContextManager:
        """While it is open, the model's own parameters are whole and may be read."""

    gathers: bool
    """Whether ``weights`` and ``state`` put copies together on the CPU; otherwise they give what training goes on with."""

    def weights(self) -> dict[str, Tensor]:
        """What a snapshot holds, whole, on rank 0; nothing elsewhere."""

    def state(self) -> dict[str, Tensor]:
        """The optimizer's state by the names of parameters, whole, on rank 0; nothing elsewhere."""

    def load(self, weights: dict[str, Tensor], state: dict[str, Tensor], source: str) -> None:
        """The inverse of ``weights`` and ``state``. Raises UserError naming ``source``, changing nothing, unless all fits."""


class WholeUpdate:
    """One process alone, DDP, or a sharded base: gradients are summed over the processes, each steps by itself."""

    gathers = False

    def __init__(self, recipe: Recipe, plan: Plan, model: Model, world: World):
        self.model, self.world, self.trainable = model, world, model.trainable()
        self.limit = recipe.train.max_grad_norm or math.inf
        self.optimizer = make_optimizer(recipe, self.trainable.values())
        self.gradients = gradients_for(list(self.trainable.values()), world, plan.batch, recipe.train.exact)

    def backward(self, loss: Tensor, *, counts: bool) -> None:
        loss.backward()
        if counts:
            self.gradients.add()
        else:
            self.drop()

    def finish(self) -> None:
        self.gradients.finish()

    def norm(self) -> float:
        return float(torch.nn.utils.clip_grad_norm_(self.trainable.values(), self.limit, foreach=True))

    def apply(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.drop()

    def drop(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def spoilt(self) -> list[str]:
        return not_finite(optimizer_tensors(self.optimizer, self.trainable))

    def replicas(self) -> dict[str, nn.Parameter]:
        return self.trainable

    def bit_sums(self) -> dict[str, int]:
        return bit_sums(self.trainable, self.optimizer)

    def whole(self) -> AbstractContextManager:
        return nullcontext()

    def weights(self) -> dict[str, Tensor]:
        return self.model.tensors(copy=False) if self.world.main else {}

    def state(self) -> dict[str, Tensor]:
        return optimizer_tensors(self.optimizer, self.trainable) if self.world.main else {}

    def load(self, weights: dict[str, Tensor], state: dict[str, Tensor], source: str) -> None:
        self.model.load_tensors(weights, source)
        load_optimizer_tensors(self.optimizer, self.trainable, state, source)


def bit_sums(trainable: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Of each parameter together with what rounding keeps from a bf16 weight for a while (KahanAdamW)."""
    rests = {name: optimizer.state.get(p, {}).get("kahan_comp") for name, p in trainable.items()}
    sums = [bits(p) + (bits(rests[name]) if rests[name] is not None else 0) for name, p in trainable.items()]
    return dict(zip(trainable, torch.stack(sums).tolist()))


def bits(tensor: Tensor) -> Tensor:
    """The sum of the bits of ``tensor``, read as integers: exact, and made where the tensor is."""
    return tensor.detach().contiguous().view(INTEGERS[tensor.element_size()]).sum(dtype=torch.int64)


def update_for(recipe: Recipe, plan: Plan, model: Model, world: World) -> Update:
    """The way of stepping that ``world.engine`` stands for."""
    if world.engine not in ("zero2", "zero3"):
        return WholeUpdate(recipe, plan, model, world)
    from dedistill.engine.zero import ZeroUpdate

    return ZeroUpdate(recipe, model, world)
