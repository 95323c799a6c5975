"""From the gradients of micro-batches, on any number of processes, to one optimizer step."""

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from dedistill.distributed.world import World
from dedistill.errors import UserError
from dedistill.models.model import Model
from dedistill.recipe import Recipe
from dedistill.recipe.resolve import filled
from dedistill.training.optim import load_optimizer_tensors, make_optimizer, optimizer_tensors

# --- the gradient of a batch to the last bit, whoever computed which part of it --------------------------------------


RESOLUTION = 2.0**-52
"""Step of the fixed-point numbers: far below the epsilon of AdamW (1e-8); floats above 4e-9 keep all their bits."""
LIMIT = 2.0**11
"""Sums of gradients stay below this in size, or they would not fit 63 bits."""


class ExactGradients:
    """Sums of integers, which come out the same in any order: weights are bit-equal on any number of processes.

    Each sample's gradient is rounded to a multiple of 2^-52 and added as int64. 8 bytes per parameter are kept, and
    travel. A gradient too large for that makes the step's gradient NaN, so that the step is not applied.
    """

    def __init__(self, parameters: list[nn.Parameter], world: World, batch: int):
        """batch: samples per step; each is added alone, its loss divided by ``batch``."""
        self.parameters, self.world, self.limit = parameters, world, LIMIT / batch
        self.sums = [torch.zeros_like(p, dtype=torch.int64) for p in parameters]
        self.refused = torch.zeros((), dtype=torch.int64, device=parameters[0].device)

    def add(self) -> None:
        """Take in the gradients of one sample."""
        used = [(total, p, p.grad) for total, p in zip(self.sums, self.parameters) if p.grad is not None]
        largest = torch.stack([grad.abs().amax().double() for _, _, grad in used])
        fits = (largest < self.limit).all()  # false for NaN, too
        self.refused += ~fits
        for total, parameter, grad in used:
            # where() instead of a branch on ``fits``: the device need not be waited for
            total += (grad.double() / RESOLUTION).round_().where(fits, 0.0).long()
            parameter.grad = None

    def finish(self) -> None:
        """Leave the sum over all samples of all ranks in ``.grad``. Once per step, on every rank."""
        self.world.all_reduce_([*self.sums, self.refused])
        for total, parameter in zip(self.sums, self.parameters):
            exact = total.double() * RESOLUTION
            parameter.grad = exact.where(self.refused == 0, torch.nan).to(parameter.grad_dtype)
            total.zero_()
        self.refused.zero_()


# --- one optimizer step after another --------------------------------------------------------------------------------


class Engine:
    """How a run's work is spread over its processes. This one: every process holds everything (one alone, or DDP).

    Gradients are summed over the processes, and each steps by itself. Other engines replace what they do otherwise. First
    ``check``, then ``place``, then steps: ``backward`` for each micro-batch, ``finish``, then ``apply`` or ``discard``. All
    methods after ``check`` must be called by all processes.
    """

    name = "ddp"
    """What the launcher calls it (World.engine) and plan.json says."""
    placement = ""
    """What it shards, as the header of a run goes on after the devices."""
    requires_equal_forwards = False
    """Whether all processes must run equally many passes: each asks the others for weights or sums of gradients."""
    builds_on_cpu = False
    """Whether the model is to be built in the memory of the CPU, since no device holds all of it."""
    gathers = False
    """Whether ``weights`` and ``state`` put copies together on the CPU; otherwise they give what training goes on with."""
    optimizer: torch.optim.Optimizer

    def __init__(self, recipe: Recipe, world: World):
        self.recipe, self.world = recipe, world
        world.requires_equal_forwards = self.requires_equal_forwards

    def check(self) -> None:
        """Raises UserError, before anything is loaded, for a recipe that cannot be trained so."""
        if self.requires_equal_forwards and self.recipe.online.every:
            raise UserError(
                f"{self.recipe.where('online.every')}: with {self.name} no process makes pairs by itself, having a part of the "
                "network alone: make them beforehand (dedistill pairs, data.pairs), or use launch/ddp.yaml",
                2,
            )
        if self.builds_on_cpu and self.recipe.base.swap not in (0, "auto"):
            raise UserError(
                f"{self.recipe.where('base.swap')}: {self.name} leaves each process a part of every block and puts blocks "
                "together itself; set base.swap = 0, or use launch/ddp.yaml",
                2,
            )

    def place(self, model: Model, device: torch.device | str) -> None:
        """Take ``model`` over, each process its part, and make the optimizer. What reads the weights themselves must have
        done so before. Raises UserError when what was asked for is not what came of it."""
        self.model, self.trainable = model, model.trainable()
        parameters = list(self.trainable.values())
        self.coarse = [p for p in parameters if p.dtype.itemsize < 4]
        for parameter in self.coarse:
            parameter.grad_dtype = torch.float32  # bf16 would round the small ones of many micro-batches away
        self.optimizer = make_optimizer(self.recipe, parameters)
        self.exact = ExactGradients(parameters, self.world, self.recipe.train.batch) if self.recipe.train.exact else None

    def backward(self, loss: Tensor, *, counts: bool) -> None:
        """Add the gradient of ``loss``, the share of one micro-batch in the loss of the step. counts: False for a pass that
        only pads the others' count with; such passes come first in a step."""
        loss.backward()  # autograd adds to what is in .grad already
        if not counts:
            self.discard()
        elif self.exact:
            self.exact.add()

    def finish(self) -> Tensor:
        """Sum the gradient of the step over its micro-batches and processes, and clip it as the recipe says. Returns its norm
        before that: float32, the same on every process. Its device is not waited for."""
        if self.exact:
            self.exact.finish()
        else:
            for parameter in self.trainable.values():
                if parameter.grad is None:  # this rank had nothing to do
                    parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype)
            self.world.all_reduce_([p.grad for p in self.trainable.values() if p.grad is not None])
        limit = self.recipe.train.max_grad_norm or math.inf  # with infinity it is only measured
        return torch.nn.utils.clip_grad_norm_(self.trainable.values(), limit, foreach=True).float()

    def apply(self, lr: float) -> None:
        """One step of the optimizer. The gradients are gone afterwards."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        for parameter in self.coarse:  # one by one: no device has room for all of them twice
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None, "finish has left one everywhere"
            parameter.grad_dtype = parameter.dtype
            parameter.grad = gradient.to(parameter.dtype)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for parameter in self.coarse:
            parameter.grad_dtype = torch.float32

    def discard(self) -> None:
        """Forget the gradients; nothing else changes."""
        self.optimizer.zero_grad(set_to_none=True)

    def replicated_params(self) -> dict[str, nn.Parameter]:
        """Trained parameters of which every process holds all, to be compared between them."""
        return self.trainable

    def bit_sums(self) -> dict[str, int]:
        """A number of each trained parameter that changes with its bits; the same on every process."""
        return bit_sums(self.trainable, self.optimizer)

    def gathered_params(self) -> AbstractContextManager[object]:
        """While it is open, the model's own parameters are whole and may be read."""
        return nullcontext()

    def weights(self) -> dict[str, Tensor]:
        """What a snapshot holds, whole, on rank 0; nothing elsewhere."""
        return self.model.tensors(copy=False) if self.world.main else {}

    def state(self) -> dict[str, Tensor]:
        """The optimizer's state by the names of parameters, whole, on rank 0; nothing elsewhere."""
        return optimizer_tensors(self.optimizer, self.trainable) if self.world.main else {}

    def load(self, weights: dict[str, Tensor], state: dict[str, Tensor], source: str) -> None:
        """The inverse of ``weights`` and ``state``. Raises UserError naming ``source``, changing nothing, unless all fits."""
        self.model.load_tensors(weights, source)
        load_optimizer_tensors(self.optimizer, self.trainable, state, source)


def learning_rate(recipe: Recipe, step: int) -> float:
    """Rate of step ``step`` (from 0): linear warm-up, then constant, linear or cosine decay to lr_floor * lr."""
    t = recipe.train
    if step < t.warmup:
        return t.lr * (step + 1) / t.warmup
    if t.schedule == "constant":
        return t.lr
    done = (step - t.warmup) / (t.steps - t.warmup)
    share = {"linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[t.schedule]
    floor = filled(t.lr_floor, "train.lr_floor")
    return t.lr * (floor + (1 - floor) * share)


INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of a number -> the integers that have its bits."""


def bit_sums(trainable: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Of each parameter together with what rounding keeps from a bf16 weight for a while (KahanAdamW)."""
    rests = {name: optimizer.state.get(p, {}).get("kahan_comp") for name, p in trainable.items()}
    sums = [bits(p) + (bits(rests[name]) if rests[name] is not None else 0) for name, p in trainable.items()]
    return dict(zip(trainable, torch.stack(sums).tolist()))


def bits(tensor: Tensor) -> Tensor:
    """The sum of the bits of ``tensor``, read as integers: exact, and made where the tensor is."""
    return tensor.detach().contiguous().view(INTEGERS[tensor.element_size()]).sum(dtype=torch.int64)
