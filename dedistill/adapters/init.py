"""How an adapter starts, and the check that it really started so."""

from collections.abc import Callable

import torch
from lycoris.modules.lokr import LokrModule
from torch import Tensor, nn

from dedistill.adapters.delta import delta
from dedistill.errors import UserError
from dedistill.flow import keyed

TOLERANCE = 0.01
"""Relative error allowed between the size an initialisation asked for and the size found afterwards."""


@torch.no_grad()
def initialise(module: nn.Module, name: str, weight: Callable[[], Tensor], *, init: str, scale: float, seed: int) -> None:
    """Set the factors of one LyCORIS module, a function of (seed, name) alone.

    default: LyCORIS' own start, delta 0. ones: w1 = 1 and delta 0. perturbed_normal: w1 = 1 and the second factor
    normal with ``scale`` times the mean and deviation of the layer's dense ``weight()`` (jimmycarter's LibreFLUX).
    A decomposed factor, and LoRA, get normal factors whose product has that deviation and mean 0.
    """
    rng = keyed.generator(seed, f"adapter-init/{name}")

    def normal(like: Tensor) -> Tensor:
        return torch.from_numpy(rng.standard_normal(tuple(like.shape), dtype="float32"))

    def kaiming(like: Tensor) -> Tensor:  # kaiming_uniform(a = sqrt 5): uniform within 1 / sqrt(columns)
        bound = like.shape[1] ** -0.5
        return torch.from_numpy(rng.uniform(-bound, bound, tuple(like.shape)).astype("float32"))

    lokr = isinstance(module, LokrModule)
    if init == "default":
        first = module.lokr_w1 if lokr else module.lora_down.weight
        first.copy_(kaiming(first))
        if lokr and not module.use_w2:
            module.lokr_w2_a.copy_(kaiming(module.lokr_w2_a))
        return
    if lokr:
        module.lokr_w1.fill_(1.0)
    if init == "ones":
        if not module.use_w2:
            module.lokr_w2_a.copy_(normal(module.lokr_w2_a) * module.lokr_w2_a.shape[1] ** -0.5)
        return
    dense = weight()
    if lokr and module.use_w2:
        draw = normal(module.lokr_w2)
        draw = (draw - draw.mean()) / draw.std() * dense.std() + dense.mean()
        module.lokr_w2.copy_(draw * scale)
        return
    left, right = (module.lokr_w2_a, module.lokr_w2_b) if lokr else (module.lora_up.weight, module.lora_down.weight)
    a, b = normal(left), normal(right)
    a, b = a / a.shape[1] ** 0.25, b / a.shape[1] ** 0.25
    size = (scale * dense.std() / ((a @ b).std() * module.scale)) ** 0.5
    left.copy_(a * size)
    right.copy_(b * size)


@torch.no_grad()
def check_started(
    modules: dict[str, nn.Module], weight: Callable[[str], Tensor], *, init: str, scale: float
) -> dict[str, float]:
    """Deviation of each layer's delta relative to its weight's; raises UserError where it is not what was asked for.

    A trainer that drops its initialisation silently can train for weeks before anyone sees it (LibreFLUX did).
    """
    wanted = scale if init == "perturbed_normal" else 0.0
    found = {name: float(delta(m).std() / weight(name).std()) for name, m in modules.items()}
    wrong = {n: v for n, v in found.items() if abs(v - wanted) > (TOLERANCE + _rounding(modules[n])) * wanted}
    if wrong:
        name, value = next(iter(wrong.items()))
        raise UserError(
            f"adapter.init: '{init}' did not take effect in {len(wrong)} of {len(modules)} layers, e.g. {name}: "
            f"deviation of the delta is {value:.3g} of the weight's, {wanted:.3g} was asked for"
        )
    return found


def _rounding(module: nn.Module) -> float:
    """Relative rounding of one stored number: bf16 factors carry 8 bits."""
    return 0.0 if next(module.parameters()).dtype == torch.float32 else 2.0**-8
