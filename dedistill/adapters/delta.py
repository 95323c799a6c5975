"""The weight change an adapter stands for: one formula for init checks, merging, export and tests."""

import torch
from lycoris.modules.lokr import LokrModule
from torch import Tensor, nn


def delta(module: nn.Module) -> Tensor:
    """The change of weight [out, in], float32, of one LyCORIS LoKr or LoRA module.

    LoKr: w1 (x) w2, with w2 = w2_a w2_b when decomposed; LoRA: up down. Both times alpha / rank. LyCORIS' own
    ``get_diff_weight`` applies that scale twice for decomposed factors (4.1.3), hence not used.
    """
    if isinstance(module, LokrModule):
        w2 = module.lokr_w2 if module.use_w2 else module.lokr_w2_a.float() @ module.lokr_w2_b.float()
        product = torch.kron(module.lokr_w1.float().contiguous(), w2.float().contiguous())
    else:
        product = module.lora_up.weight.float() @ module.lora_down.weight.float()
    return product * module.scale


@torch.no_grad()
def merge(net: nn.Module, modules: dict[str, nn.Module]) -> None:
    """Add every adapter's delta into the dense linear it sits on: float32 sum, rounded once to the weight's dtype.

    modules: linear name -> LyCORIS module. Raises ValueError for a quantized linear, whose codes would swallow
    most of a small delta: merge into the unquantized base and quantize again.
    """
    linears = {name: net.get_submodule(name) for name in modules}
    for name, linear in linears.items():
        if type(linear) is not nn.Linear:
            raise ValueError(f"'{name}' is a {type(linear).__name__}; merge into the unquantized base instead")
    for name, linear in linears.items():
        linear.weight.copy_(linear.weight.float() + delta(modules[name]))
