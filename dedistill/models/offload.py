"""What checkpointed blocks keep for their gradients, in the memory of the CPU until the pass back comes for it."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

LEAST = 1 << 20
"""Bytes; what is smaller stays."""


class Away:
    """A tensor in pinned memory of the CPU, copied there and back without the CPU waiting."""

    def __init__(self, tensor: Tensor):
        self.device = tensor.device
        cuda = tensor.device.type == "cuda"
        self.kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=cuda)
        if not cuda:
            self.kept.copy_(tensor)
            return
        stream, computing = _copies(tensor.device), torch.cuda.current_stream(tensor.device)
        stream.wait_stream(computing)
        with torch.cuda.stream(stream):
            self.kept.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)  # or its memory would be given away before it is read

    def back(self) -> Tensor:
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).wait_stream(_copies(self.device))
        return self.kept.to(self.device, non_blocking=True, copy=True)


@cache
def _copies(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@contextmanager
def inputs_away(args: tuple[object, ...]) -> Iterator[None]:
    """While a checkpointed block is called with ``args``, of what is saved those of them that need gradients are put away.

    What all blocks share, such as positions, stays. The saved tensors of the block itself do not come here: they are dropped.
    """
    storages = [t.untyped_storage() for t in tree_leaves(args) if isinstance(t, Tensor) and t.requires_grad]
    wanted = {storage._cdata for storage in storages if storage.nbytes() >= LEAST}

    def put(tensor: Tensor) -> Tensor | Away:
        return Away(tensor) if tensor.untyped_storage()._cdata in wanted else tensor

    with saved_tensors_hooks(put, lambda kept: kept.back() if isinstance(kept, Away) else kept):
        yield
