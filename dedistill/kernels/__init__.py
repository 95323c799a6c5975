"""GPU kernels of our own, in Triton, for what torch does in many small or slow ones.

Every load and store is masked: after a memory fault a process could do nothing more on its GPU, with torch's kernels neither.

Each caller has the same in plain torch beside it, which runs everywhere else and says what is right.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

KERNELS = ("codes", "kahan", "kronecker", "products")
"""Modules of this folder in Triton. Each, as attention.py, has ``distance(device)``: how far it is from torch, relative to the
result."""
FAR = 1e-2
"""bf16 rounds by 4e-3."""
ADA = (8, 9)
"""Compute capability of the first cards with fp8."""


class Saved(Protocol):
    """What autograd keeps between the two passes of a function."""

    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *tensors: Tensor) -> None: ...


def has_fp8(device: torch.device) -> bool:
    """Whether ``device`` computes with 8-bit floats; CPUs do, by float32."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= ADA


proven: set[tuple[torch.device, str]] = set()
"""Where which of ``KERNELS`` may be used: all of them after :func:`prove`, but for those that failed."""


def prove(device: torch.device | str, names: Sequence[str] = KERNELS) -> None:
    """Try each kernel on a GPU, against what torch gives there; those that fail are not used, and a note says so.

    Before the first forward pass: within one, the trial would be taken for a part of it.
    """
    place = torch.empty(0, device=device).device
    if place.type != "cuda" or (names is KERNELS and find_spec("triton") is None):
        return
    for kernel in names:
        if problem := _problem(place, kernel):
            print(
                f"note: the kernel '{kernel}' {problem} on {place}; torch's are used instead, which are slower", file=sys.stderr
            )
        else:
            proven.add((place, kernel))


def _problem(device: torch.device, kernel: str) -> str:
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            far: float = import_module(f"dedistill.kernels.{kernel}").distance(device)
    except Exception as e:  # whatever is wrong with a compiler, torch's own kernels remain
        return f"fails with {type(e).__name__}: {' '.join(str(e).split())[:200]}"
    return "" if far < FAR else f"is {far:.2g} from torch's result"
