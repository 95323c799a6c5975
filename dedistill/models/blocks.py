"""What a recipe has done with a network's blocks: computed again in backward, left out, kept in the memory of the CPU."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dedistill.errors import UserError, amount
from dedistill.flow.guidance import SkipLayers, guider_of
from dedistill.models.family import Denoiser, Output
from dedistill.models.offload import inputs_away
from dedistill.models.swap import move_rest, spread, without_room
from dedistill.recipe import Recipe


def check_blocks(recipe: Recipe, count: int) -> None:
    """Raises UserError for a key that asks for more blocks than the ``count`` that the network has."""
    for key, wanted in (("base.swap", recipe.base.swap), ("train.gradient_checkpointing", recipe.train.gradient_checkpointing)):
        if wanted != "auto" and wanted > count:
            raise UserError(f"{recipe.where(key)}: {wanted} blocks, and the network has {count}", exit_code=2)
    if isinstance(guider := guider_of(recipe.sample.guider), SkipLayers) and max(guider.blocks) >= count:
        wrong = f"no block {max(guider.blocks)}; the network has {amount(count, 'block')}, from 0"
        raise UserError(f"{recipe.where('sample.guider')}: {wrong}", exit_code=2)


SPARE = 4 << 30
"""Bytes for what images are made with beside a base: adapter, hidden states, an image of 1024 pixels that is decoded."""


def may_wait(recipe: Recipe, blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """Blocks that are to lie in the memory of the CPU; all of them where :func:`must_wait` is to say which."""
    return list(blocks) if recipe.base.swap == "auto" else _spread(blocks, recipe.base.swap)


def must_wait(recipe: Recipe, blocks: Sequence[nn.Module], denoiser: nn.Module, device: torch.device | str) -> list[nn.Module]:
    """Of the blocks that :func:`may_wait` those that have to; the others are on ``device`` afterwards.

    A recipe that is trained says how many ("auto" was settled by a forecast). Where only images are made, "auto" leaves SPARE
    bytes of the device free.
    """
    if recipe.base.swap != "auto":
        return _spread(blocks, recipe.base.swap)
    waiting = without_room(blocks, device, sum(p.nbytes for block in blocks for p in block.parameters()) + SPARE)
    move_rest(denoiser, device, waiting)
    return waiting


def _spread(blocks: Sequence[nn.Module], count: int) -> list[nn.Module]:
    return [blocks[i] for i in spread(count, len(blocks))]


def checkpoint_blocks(denoiser: nn.Module, blocks: Sequence[nn.Module], wanted: int | bool, *, away: bool = False) -> int:
    """Have so many of ``blocks``, or all, keep their inputs alone and be computed again in backward; returns how many.

    The first ones, since what the last ones keep is gone before the first are computed again. With all of them, whatever else
    the network can compute again. away: what they keep waits in the memory of the CPU.
    """
    chosen = set(blocks if wanted is True else blocks[:wanted])

    def call(block: nn.Module, *args: Any) -> object:
        if wanted is not True and block not in chosen:
            return block(*args)
        with inputs_away(args) if away else nullcontext():
            # what is frozen draws nothing at random
            return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=block.training)

    if chosen:
        cast(Denoiser, denoiser).enable_gradient_checkpointing(call)
    return len(chosen) if getattr(denoiser, "is_gradient_checkpointing", False) else 0


def joint_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Image and text that a block of joint attention is given: by name, and by place where it is checkpointed."""
    given = dict(zip(("hidden_states", "encoder_hidden_states"), args)) | kwargs
    return given["hidden_states"], given["encoder_hidden_states"]


@contextmanager
def without_blocks(
    blocks: Sequence[nn.Module], numbers: Sequence[int], unchanged: Callable[[tuple[Any, ...], dict[str, Any]], Output]
) -> Iterator[None]:
    """While this lasts, those of ``blocks`` with these ``numbers`` (from 0) change nothing. unchanged: the family's."""
    if wrong := [n for n in numbers if n >= len(blocks)]:
        raise UserError(f"guider 'skip_layers': no block {wrong[0]}; the network has {amount(len(blocks), 'block')}, from 0", 2)

    def called(*args: Any, **kwargs: Any) -> Output:
        return unchanged(args, kwargs)

    skipped = [blocks[n] for n in numbers]
    own = [vars(block).get("forward") for block in skipped]
    for block in skipped:
        block.forward = called
    try:
        yield
    finally:
        for block, forward in zip(skipped, own):
            del block.forward
            if forward is not None:
                block.forward = forward
