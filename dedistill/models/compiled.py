"""Blocks that torch compiles: few graphs, which serve all blocks of a kind at any size, and few kernels in each."""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from dedistill.models.family import Family

COMPILER = "inductor"
"""torch's own: makes Triton kernels on a GPU, C++ on a CPU."""
OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {"combo_kernels": True, "shape_padding": False}
"""Of that compiler. Kernels that do not wait for each other become one: the codes of many weights turn into floats at once. No
products are timed to find whether padding would make them faster."""
GRAPHS = 64
"""Of one kind of block at most: torch's own limit of 8 is below what there are sorts of batches."""


def compile_blocks(family: Family, blocks: Sequence[nn.Module]) -> int:
    """Have torch compile what each of ``blocks`` computes, as a whole and for any size; returns how many.

    What is done around a block, before it is called, stays as it is: hooks, checkpointing, copies of its weights. A graph
    serves all blocks of a kind. There is one for each sort of batch: with a mask or without, of one sample or more, of texts
    of one token or more, with gradients or without.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    for block in blocks:
        options = OPTIONS if COMPILER == "inductor" else None
        compiled = torch.compile(block.forward, fullgraph=True, backend=COMPILER, options=options)
        call = partial(_joined, compiled) if family.joins_text(block) else compiled
        names = family.passed_on if _trained(block) else ()
        block.forward = partial(_of_one_sort, call, inspect.signature(block.forward), names)
    return len(blocks)


def _trained(block: nn.Module) -> bool:
    """By itself, or by an adapter, which takes a layer's forward."""
    return any(p.requires_grad for p in block.parameters()) or any("forward" in vars(m) for m in block.modules())


def _of_one_sort(
    call: Callable[..., object], signature: inspect.Signature, passed_on: tuple[str, ...], *args: Any, **kwargs: Any
) -> object:
    """What would be graphs of their own is made alike: slices of what another block returned are copied, the first block's
    inputs want gradients as those of the others do, and sizes other than the network's widths are said to vary."""
    given: dict[str, Any] = tree_map_only(Tensor, Tensor.contiguous, signature.bind(*args, **kwargs).arguments)
    if torch.is_grad_enabled():
        for name in (n for n in passed_on if not given[n].requires_grad):
            given[name] = given[name].detach().requires_grad_()
    for tensor in tree_leaves(given):
        if isinstance(tensor, Tensor):
            _say_what_varies(tensor)
    return call(**given)


def _say_what_varies(tensor: Tensor) -> None:
    """Of images [B, C, H, W] and masks [B, 1, 1, T] all but the second size; of all else all but the last, a width."""
    width = 1 if tensor.dim() == 4 else tensor.dim() - 1
    for size in range(tensor.dim()):
        if size != width:
            torch._dynamo.maybe_mark_dynamic(tensor, size)


def _joined(compiled: Callable[..., tuple[Tensor, Tensor]], **given: Any) -> tuple[Tensor, ...]:
    """Text before the image in one sequence, of one length: the compiler (torch 2.13) fails where two lengths are added."""
    text, image = given["encoder_hidden_states"], given["hidden_states"]
    both = torch.cat([text, image], 1)
    _say_what_varies(both)
    _, out = compiled(**given | {"hidden_states": both, "encoder_hidden_states": both.new_empty(len(both), 0, both.shape[2])})
    return out.split([text.shape[1], image.shape[1]], 1)
