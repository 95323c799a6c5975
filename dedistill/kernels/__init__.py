"""GPU kernels of our own, in Triton, for what torch does in many small or slow ones.

Each caller has the same in plain torch beside it, which runs everywhere else and says what is right.
"""

from importlib.util import find_spec
from typing import Protocol

from torch import Tensor


class Saved(Protocol):
    """What autograd keeps between the two passes of a function."""

    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *tensors: Tensor) -> None: ...


def usable(tensor: Tensor) -> bool:
    """Whether kernels can be made for where ``tensor`` is. torch brings Triton along with CUDA."""
    return tensor.is_cuda and find_spec("triton") is not None
