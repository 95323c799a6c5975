"""What ``torch.autocast`` to bf16 would choose, for tensors on "meta", of which torch's own knows nothing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

LOWER = frozenset(
    [
        *("linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "addbmm", "baddbmm", "einsum"),
        *("conv1d", "conv2d", "conv3d", "conv_transpose2d", "attention_of_cards", "attention_of_cpus"),
    ]
)
"""Computed in bf16: what torch's documentation lists as far as networks use it."""
HIGHER = {
    False: frozenset(["mse_loss", "cosine_similarity"]),
    True: frozenset(
        ["mse_loss", "cosine_similarity", "layer_norm", "group_norm", "pow", "__pow__", "softmax", "exp", "log", "rsqrt", "sum"]
    ),
}
"""Computed in float32, by whether it is on a card."""


class Autocast(TorchFunctionMode):
    """Stands for ``torch.autocast``: on within :meth:`on`."""

    def __init__(self, *, card: bool):
        super().__init__()
        self.higher = HIGHER[card]
        self.used = False
        self.casts: dict[int, Tensor] = {}
        """Of weights, which torch keeps until the outermost autocast ends."""

    @contextmanager
    def on(self, *_: object) -> Iterator[None]:
        """What ``torch.autocast(device, dtype)`` is; not within itself."""
        self.used = True
        try:
            with self:
                yield
        finally:  # what is computed again is broken off by an exception once it is complete
            self.casts.clear()

    def checkpoint(self, block: nn.Module, *args: Any, **kwargs: Any) -> object:
        """``torch.utils.checkpoint.checkpoint`` that has ``block`` computed again so, too, in a pass back, as torch does with
        its own."""

        def call(*inputs: Any) -> object:
            with self.on() if self.used and torch._C._current_graph_task_id() != -1 else nullcontext():
                return block(*inputs)

        return checkpoint(call, *args, **kwargs)

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in LOWER:
            args, kwargs = tree_map_only(Tensor, self._lowered, (args, kwargs))
        elif name in self.higher:
            args, kwargs = tree_map_only(Tensor, lambda t: t.float() if t.dtype == torch.bfloat16 else t, (args, kwargs))
        return func(*args, **kwargs)

    def _lowered(self, tensor: Tensor) -> Tensor:
        if tensor.dtype != torch.float32:
            return tensor
        if not (tensor.is_leaf and tensor.requires_grad):
            return tensor.to(torch.bfloat16)
        if id(tensor) not in self.casts:
            self.casts[id(tensor)] = tensor.to(torch.bfloat16)
        return self.casts[id(tensor)]
