"""Optimizers, and their state by the names of parameters."""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import optimi
import torch
from optimi.utils import debias_beta
from torch import Tensor, nn

import dedistill.kernels as kernels
from dedistill.errors import UserError
from dedistill.recipe import Recipe

if TYPE_CHECKING:
    from dedistill.kernels import kahan


class KahanAdamW(optimi.AdamW):
    """optimi's AdamW for bf16 parameters, with what they round away kept in float32 (8 bytes of state per parameter).

    optimi keeps the compensation in bf16, which near 1 is still too coarse for steps of 1e-5, and multiplies bf16
    weights by 1 - lr * decay, which rounds to 1: here the decay goes into the compensation, too.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, betas: tuple[float, float], decay: float):
        super().__init__(params, lr=lr, betas=betas, weight_decay=0.0, kahan_sum=True, triton=False)
        self.decay = decay
        self.places: kahan.Places | None = None

    def _init_state(self, group: dict[str, Any], state: dict[str, Any], param: Tensor) -> None:
        fresh = "kahan_comp" not in state
        super()._init_state(group, state, param)
        if fresh:
            state["kahan_comp"] = torch.zeros_like(param, dtype=torch.float32)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None, param: Tensor | None = None) -> Tensor | None:
        if all((p.device, "kahan") in kernels.proven for group in self.param_groups for p in group["params"]):
            self._step_at_once()
            return None
        for group in self.param_groups if self.decay else ():
            for p in group["params"]:
                if p.grad is not None:
                    self._init_state(group, self.state[p], p)
                    rest = self.state[p]["kahan_comp"]
                    rest.sub_(p.float() + rest, alpha=group["lr"] * self.decay)
        return super().step(closure, param)

    def _step_at_once(self) -> None:
        """The same in one kernel for each group."""
        from dedistill.kernels import kahan

        for group in self.param_groups:
            lists: kahan.Lists = ([], [], [], [], [])
            self._init_group(group, *lists)
            group["step"] += 1
            keep, keep_square = (debias_beta(group[beta], int(group["step"])) for beta in ("beta1", "beta2"))
            if lists[0]:
                if self.places is None or not self.places.fits(lists[0]):
                    self.places = kahan.Places(lists[0])
                numbers = {"lr": group["lr"], "keep": keep, "keep_square": keep_square, "eps": group["eps"]}
                kahan.step(self.places, lists, **numbers, decay=self.decay)


def make_optimizer(recipe: Recipe, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW for fp32 parameters (torch, fused), or :class:`KahanAdamW` for bf16 ones.

    The bf16 form keeps both moments in bf16: right only for a second beta of at most .99, which recipes enforce
    (at .999 a bf16 second moment rounds back and never falls).
    """
    t = recipe.train
    parameters = list(parameters)
    betas = (t.betas[0], t.betas[1])
    if t.optimizer == "adamw_bf16":
        return KahanAdamW(parameters, lr=t.lr, betas=betas, decay=t.weight_decay)
    return torch.optim.AdamW(parameters, lr=t.lr, betas=betas, weight_decay=t.weight_decay, fused=True)


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The optimizer's state as it stands, ``<parameter name>/<key>`` -> tensor; for any optimizer with tensor states."""
    states = [(name, optimizer.state.get(parameter, {})) for name, parameter in names.items()]
    states += [(f"group/{i}", group) for i, group in enumerate(optimizer.param_groups)]  # optimi counts its steps there
    return {f"{name}/{k}": v.detach() for name, state in states for k, v in state.items() if isinstance(v, Tensor)}


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of ``tensors`` that hold a NaN or an infinity. Without any, the device is waited for once."""
    numbers = [t for t in tensors.values() if t.dim()]  # the others count steps
    # finite only where all of them are; not the largest size: on a CPU torch takes 17 times as long for it
    if torch.nn.utils.get_total_norm(numbers, 2.0, foreach=True).isfinite():
        return []
    return [name for name, tensor in tensors.items() if not tensor.isfinite().all()]


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: dict[str, nn.Parameter], tensors: dict[str, Tensor], source: str
) -> None:
    """The inverse of :func:`optimizer_tensors`. Raises UserError naming ``source``, changing nothing, unless names and
    shapes fit; without any tensors the optimizer starts anew."""
    entries = state_entries(optimizer, names, tensors, source)
    optimizer.state.clear()
    for group in optimizer.param_groups:
        for key in [key for key, value in group.items() if isinstance(value, Tensor)]:
            del group[key]
        if "setup" in group:  # optimi's word for having counted steps
            group["setup"] = False
    for name, key, value in entries:
        if name.startswith("group/"):
            group = optimizer.param_groups[int(name.removeprefix("group/"))]
            group[key] = value.clone()
            group["setup"] = True  # or optimi would start its count of steps anew
        else:
            optimizer.state[names[name]][key] = value.to(names[name].device).clone()


def state_entries(
    optimizer: torch.optim.Optimizer, names: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: str
) -> list[tuple[str, str, Tensor]]:
    """(name of a parameter or group, key, value) of each of ``tensors``. Raises UserError naming ``source`` unless they are
    the whole state of parameters of these names and shapes, or none at all."""
    entries = [(*full.rpartition("/")[::2], value) for full, value in tensors.items()]
    if tensors and (problem := _mismatch(optimizer, names, entries)):
        raise UserError(f"the optimizer state of '{source}' does not fit this recipe: {problem}")
    return entries


def _mismatch(optimizer: torch.optim.Optimizer, names: Mapping[str, Tensor], entries: list[tuple[str, str, Tensor]]) -> str:
    """What keeps (name, key, value) ``entries`` from being loaded; empty when nothing does."""
    groups = {f"group/{i}" for i in range(len(optimizer.param_groups))}
    states = [(name, key, value) for name, key, value in entries if name not in groups]
    if unknown := [f"{name}/{key}" for name, key, _ in states if name not in names]:
        return f"{len(unknown)} unknown, e.g. {unknown[0]}"
    for name, key, value in states:
        if value.dim() and value.shape != names[name].shape:  # numbers are counts of steps
            return f"{name}/{key} is {tuple(value.shape)}, expected {tuple(names[name].shape)}"
    keys = {key for _, key, _ in states}
    found = {f"{name}/{key}" for name, key, _ in states}
    if lost := [f"{name}/{key}" for name in names for key in sorted(keys) if f"{name}/{key}" not in found]:
        return f"{len(lost)} missing, e.g. {lost[0]}"
    return "" if states else "it holds no parameter"
