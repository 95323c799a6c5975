"""One optimizer step after another under DeepSpeed: ZeRO-2 (gradients and optimizer in parts), ZeRO-3 (weights, too).

Each process holds about 1 / size of what is in parts. DeepSpeed sums and cuts gradients during backward; its mean over
processes is turned back into a sum. What is saved goes through the names of parameters, never through its own files.
"""

import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dedistill.distributed.launcher import FIXED, zero_settings
from dedistill.errors import UserError, amount
from dedistill.models.model import Model
from dedistill.models.quantize import check_engine
from dedistill.recipe import Recipe
from dedistill.training.engine import Engine, bits
from dedistill.training.optim import make_optimizer, state_entries

MOMENTS = ("exp_avg", "exp_avg_sq")
PART = "ds_tensor"
"""Attribute of a parameter that ZeRO-3 has cut: what this process holds of it. Torch's own types know nothing of it."""


class Zero(Engine):
    """Stage ``stage`` of ZeRO. ``model.root`` is DeepSpeed's engine from ``place`` on."""

    stage: int
    gathers = requires_equal_forwards = True

    def check(self) -> None:
        super().check()
        recipe = self.recipe
        if recipe.train.exact:
            raise UserError(
                f"{recipe.where('train.exact')}: DeepSpeed ({self.name}) sums gradients as floats, in an order of its own, so "
                "weights differ with the number of processes. Set train.exact = false, or use launch/ddp.yaml or fsdp2.yaml.",
                2,
            )
        if recipe.train.optimizer != "adamw":
            raise UserError(
                f"{recipe.where('train.optimizer')}: DeepSpeed ({self.name}) steps float32 copies of the weights, which "
                f"'{recipe.train.optimizer}' is made to do without. Use train.optimizer = 'adamw': its state is in parts here.",
                2,
            )
        check_engine(recipe, self.name, "launch/zero2.yaml")

    def place(self, model: Model, device: torch.device | str) -> None:
        """DeepSpeed chooses the device."""
        self.model, self.trainable = model, model.trainable()
        self.deepspeed = _import_deepspeed()
        config = _config(self.recipe)
        root = _Root(model, whole=self.stage == 3)
        if self.stage == 3:
            self._cut(root, config)
        optimizer = make_optimizer(self.recipe, self.trainable.values())
        self.engine, *_ = self.deepspeed.initialize(model=root, optimizer=optimizer, config=config)
        self.zero = self.engine.optimizer
        self.optimizer = self.zero.optimizer
        model.root = model.called = self.engine
        model.device = model.components.device = self.engine.device
        self._check_stage(root)
        model.facts["storage_bytes_here"] = local_bytes(model.components.denoiser)

    def _cut(self, root: nn.Module, config: dict[str, Any]) -> None:
        """Leave each process its part of every parameter, one after the other. Adapters work inside the layers they are
        attached to, so their parts are to be gathered together with those of the layer."""
        self.deepspeed.zero.Init(module=root, config_dict_or_path=config, dtype=torch.float32)
        root.to(self.deepspeed.get_accelerator().current_device_name())  # buffers; of parameters there is nothing left here
        for name, module in self.model.adapter.by_target.items() if self.model.adapter else ():
            layer = self.model.components.denoiser.get_submodule(name)
            for parameter in module.parameters():
                self.deepspeed.zero.register_external_parameter(layer, parameter)

    def _check_stage(self, root: nn.Module) -> None:
        stage, size = int(self.engine.zero_optimization_stage()), self.engine.dp_world_size
        if (stage, size) != (self.stage, self.world.size):
            raise UserError(f"ZeRO-{self.stage} on {self.world.size} processes was asked for; DeepSpeed made {stage} on {size}")
        whole = [name for name, p in root.named_parameters() if self.stage == 3 and not hasattr(p, PART)]
        if whole:
            raise UserError(
                f"ZeRO-3 was asked for, and {amount(len(whole), 'tensor is', 'tensors are')} whole, e.g. {whole[0]}"
            )

    def backward(self, loss: Tensor, *, counts: bool) -> None:
        self.engine.backward(loss * (self.world.size if counts else 0), scale_wrt_gas=False)

    def finish(self) -> Tensor:
        """DeepSpeed clips in its step, by the same norm."""
        self.zero.finalize_gradient_accumulation_boundary()
        square = torch.stack(torch._foreach_norm(self._gradients())).square().sum()
        self.world.all_reduce_([square])
        return square.sqrt().float()

    def _gradients(self) -> list[Tensor]:
        """This process's parts of the finished gradient."""
        return [part for group in self.zero.averaged_gradients.values() for part in group]

    def apply(self, lr: float) -> None:
        for group in self.zero.param_groups:
            group["lr"] = lr
        self.zero.step()
        self.zero.zero_grad()
        if self.zero.overflow:
            raise UserError("DeepSpeed did not apply a step whose gradient is finite; start again from the last checkpoint")

    def discard(self) -> None:
        """DeepSpeed itself forgets all about a step whose gradient is not finite, and changes nothing."""
        for part in self._gradients():
            part.fill_(torch.nan)
        self.zero.step()
        self.zero.zero_grad()

    def replicated_params(self) -> dict[str, nn.Parameter]:
        return self.trainable if self.stage == 2 else {}

    def bit_sums(self) -> dict[str, int]:
        if self.stage == 2:
            return dict(zip(self.trainable, torch.stack([bits(p) for p in self.trainable.values()]).tolist()))
        here = torch.stack([bits(_part(p)) for p in self.trainable.values()]).tolist()
        return dict(zip(self.trainable, map(sum, zip(*self.world.gather(here)))))

    def gathered_params(self) -> AbstractContextManager[object]:
        return self.deepspeed.zero.GatheredParameters(list(self.trainable.values()))

    def weights(self) -> dict[str, Tensor]:
        if self.stage == 2:
            return self.model.tensors() if self.world.main else {}
        whole = self._whole(self.deepspeed.utils.safe_get_full_fp32_param)
        alphas = self.model.adapter.alphas() if self.model.adapter and self.world.main else {}
        return whole | {name: alpha.detach().clone() for name, alpha in alphas.items()}

    def state(self) -> dict[str, Tensor]:
        if not self.optimizer.state:
            return {}
        found: dict[str, Tensor] = {}
        read = self.deepspeed.utils.safe_get_full_optimizer_state
        for key in MOMENTS:
            found |= {f"{name}/{key}": t for name, t in self._whole(partial(read, optim_state_key=key)).items()}
        if self.world.main:
            steps = next(iter(self.optimizer.state.values()))["step"]
            found |= {f"{name}/step": steps.to("cpu", copy=True) for name in self.trainable}
        return found

    def _whole(self, read: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
        """What ``read`` puts together of each parameter; one by one, kept by rank 0 alone."""
        found = {}
        for name, parameter in self.trainable.items():
            tensor = read(parameter)
            if self.world.main:
                found[name] = tensor.to("cpu", copy=True).contiguous()
        return found

    def load(self, weights: dict[str, Tensor], state: dict[str, Tensor], source: str) -> None:
        shapes = {name: torch.empty(getattr(p, "ds_shape", p.shape), device="meta") for name, p in self.trainable.items()}
        entries = state_entries(self.optimizer, shapes, state, source)
        steps = {int(value) for _, key, value in entries if key == "step"}
        if state and ({key for _, key, _ in entries} != {*MOMENTS, "step"} or len(steps) != 1):
            raise UserError(f"the optimizer state of '{source}' is not that of AdamW after one number of steps")
        with self.deepspeed.zero.GatheredParameters(list(self.trainable.values()), modifier_rank=0):  # that cuts them anew
            self.model.load_tensors(weights, source)
        self.zero.refresh_fp32_params()
        self._load_state([entry for entry in entries if entry[1] in MOMENTS], steps)

    def _load_state(self, moments: list[tuple[str, str, Tensor]], steps: set[int]) -> None:
        """moments: (parameter, key, whole value). steps: the one number of steps they have seen, or none to start anew."""
        self.optimizer.state.clear()
        for flat in self._parts() if steps else ():
            moment = {key: torch.zeros_like(flat, requires_grad=False) for key in MOMENTS}
            self.optimizer.state[flat] = moment | {"step": torch.tensor(float(*steps), device=flat.device)}
        if self.stage == 2:
            self.zero._hp_optimizer_states_linked = False
            if steps:
                self.zero._lazy_init_hp_params_optimizer_state()
        for name, key, value in moments:
            self._set_moment(self.trainable[name], value, key)

    def _parts(self) -> list[Tensor]:
        """What the optimizer steps: this process's parts of all trained weights, end to end."""
        return self.zero.single_partition_of_fp32_groups if self.stage == 2 else self.zero.fp32_partitioned_groups_flat

    def _set_moment(self, parameter: nn.Parameter, value: Tensor, key: str) -> None:
        if self.stage == 2:
            self.deepspeed.utils.safe_set_full_optimizer_state(parameter, value.to(self.engine.device), key)
            return
        length = _part(parameter).numel()  # all parts are as long; the last is padded
        padded = F.pad(value.flatten(), (0, length * self.world.size - value.numel()))
        part = padded[self.world.rank * length : (self.world.rank + 1) * length].to(self.engine.device)
        self.deepspeed.utils.safe_set_local_optimizer_state(parameter, part, key)


class Zero2(Zero):
    name, stage, placement = "zero2", 2, ", the optimizer in parts (ZeRO-2)"


class Zero3(Zero):
    name, stage, placement = "zero3", 3, ", base, adapter and optimizer in parts (ZeRO-3)"
    builds_on_cpu = True

    def check(self) -> None:
        super().check()
        recipe = self.recipe
        if recipe.train.compile != "none":
            raise UserError(
                f"{recipe.where('train.compile')}: ZeRO-3 puts each layer together as it is called, within what would be "
                "compiled; set train.compile = 'none', or use launch/zero2.yaml",
                2,
            )
        if recipe.snapshot.ema:
            raise UserError(
                f"{recipe.where('snapshot.ema')}: ZeRO-3 leaves no process whole weights to average; use launch/zero2.yaml, or "
                "average the snapshots after training",
                2,
            )


def _part(parameter: nn.Parameter) -> Tensor:
    return getattr(parameter, PART)


def local_bytes(denoiser: nn.Module) -> int:
    """Bytes of parameters that this process holds between passes: parts, and what is too small to be cut."""
    held = [t for p in denoiser.parameters() for t in (p, getattr(p, PART, None)) if t is not None]
    return sum(t.numel() * t.element_size() for t in held)


class _Root(nn.Module):
    """What DeepSpeed wraps. It calls the network in the precision of its caller, which DeepSpeed would not pass on."""

    def __init__(self, model: Model, *, whole: bool):
        """whole: register the base, too, for DeepSpeed to cut."""
        super().__init__()
        self.adapter, self._denoiser = model.adapter, [model.components.denoiser]
        self.autocast = model.bf16 and model.adapter is None  # as Model.velocity
        if whole or model.adapter is None:
            self.denoiser = model.components.denoiser

    def forward(self, *args: Any, **kwargs: Any) -> object:
        denoiser = self._denoiser[0]
        with torch.autocast(next(denoiser.parameters()).device.type, torch.bfloat16, enabled=self.autocast):
            return denoiser(*args, **kwargs)


def _config(recipe: Recipe) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,  # counts nothing: losses come divided by the batch
        "managed_gradient_accumulation": False,
        "gradient_clipping": recipe.train.max_grad_norm or 0.0,
        "zero_allow_untested_optimizer": True,  # torch's own AdamW, not one of DeepSpeed's
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**62,
        "zero_optimization": FIXED | zero_settings(),
    }


def _import_deepspeed() -> ModuleType:
    """It takes seconds to import, and prints."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {}  # or it probes for a compiler and builds an all-reduce of its own, for minutes
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed
