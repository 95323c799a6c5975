"""Peaks and work of a deep network from shallow ones: both grow by the same amount with every further block of a kind.

A peak is the largest of many moments, and another moment may win in a deeper network. So each place is measured by itself:
where a stack begins, and where it ends; in between memory changes evenly, and is never larger than at both ends.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby, pairwise
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dedistill.adapters.targets import adaptable, resolve_targets
from dedistill.forecast.meter import BASE, Meter, Peak, Work, reserved
from dedistill.forecast.paper import BACKWARD, FORWARD, Case, prepared, run, shapes_alone
from dedistill.models.quantize import excluded, linear_names
from dedistill.models.swap import saved
from dedistill.recipe.model_tables import Target
from dedistill.recipe.resolve import chosen, make_plan

GRANULE = 512
"""Bytes that CUDA's allocator rounds up to."""
SHALLOW = 2


@dataclass
class Estimate:
    """What one step takes."""

    peaks: dict[tuple[str, str], Peak]
    """Of each phase and place in it."""
    work: dict[str, Work]
    """Of each phase of a step with one micro-batch."""
    reserved: int = 0
    """Most bytes that the allocator would have taken for it; 0 where that was not followed, as in shallow networks."""
    blocks: list[int] = field(default_factory=list)
    """Bytes of the weights of each block, in order."""
    in_hand: dict[str, int] = field(default_factory=dict)
    """Place -> bytes of two blocks' weights: of the one that computes, and of the larger one of it and the one before it."""

    @property
    def highest(self) -> tuple[tuple[str, str], Peak]:
        return max(self.peaks.items(), key=lambda item: item[1].bytes)

    def total(self, *phases: str) -> Work:
        return sum((self.work[phase] for phase in phases if phase in self.work), Work())

    def plus(self, other: "Estimate", minus: "Estimate", times: int) -> "Estimate":
        """self + times (other - minus). Places that one of them does not have are left out."""
        peaks = {}
        for where in self.peaks.keys() & other.peaks.keys() & minus.peaks.keys():
            mine, more, less = (e.peaks[where] for e in (self, other, minus))
            kinds = [*dict.fromkeys([*mine.by_category, *more.by_category, *less.by_category])]
            grown = {k: _line(times, *(p.by_category.get(k, 0) for p in (mine, more, less))) for k in kinds}
            peaks[where] = Peak(_line(times, mine.bytes, more.bytes, less.bytes), {k: n for k, n in grown.items() if n > 0})
        work = {phase: w + (other.work[phase] - minus.work[phase]) * times for phase, w in self.work.items()}
        return replace(self, peaks=peaks, work=work, reserved=0)

    def swapped(self, count: int) -> "Estimate":
        """With ``count`` blocks in the memory of the CPU, of which two rooms of the largest one's size are kept for."""
        if not count:
            return self
        less = saved(self.blocks, count)
        peaks = {
            where: Peak(p.bytes - less, p.by_category | {BASE: p.by_category.get(BASE, 0) - less})
            for where, p in self.peaks.items()
        }
        come = Work(copied=max(0, less))  # in either direction all but the two that are there when it begins
        work = {phase: w + come if phase in (FORWARD, BACKWARD) else w for phase, w in self.work.items()}
        return replace(self, peaks=peaks, reserved=max(0, self.reserved - less), work=work)


def _line(times: int, start: int, more: int, less: int) -> int:
    return start + times * (more - less)


def estimate(case: Case, *, whole: bool = False) -> Estimate:
    """whole: run the network at its full depth in any case, which comes to the same, with what the allocator holds."""
    with _new_objects_alone():
        outline = _outline(case)
        kept, growths = ([len(stack) for stack in outline.stacks], []) if whole else _cheapest(outline)
        start = found = _measured(case, outline, kept)
        for deeper, times in growths:
            found = found.plus(_measured(case, outline, deeper), start, times)
    sizes = [size for size, stack in zip(start.blocks, outline.stacks) for _ in stack]
    return replace(found, blocks=sizes, reserved=0 if growths else start.reserved).swapped(
        chosen(case.recipe.base.swap, "base.swap")
    )


@contextmanager
def _new_objects_alone() -> Iterator[None]:
    """Have Python look through what is made meanwhile for what is left over, and not through all of torch again and again."""
    gc.freeze()
    try:
        yield
        gc.collect()  # a network and its hooks name each other
    finally:
        gc.unfreeze()


def _cheapest(outline: "_Outline") -> tuple[list[int], list[tuple[list[int], int]]]:
    """Blocks of each stack to run, and what to run besides: deeper networks, and how many times what they add comes.

    Stacks are left out beyond ``SHALLOW`` blocks where that is less work, counted in modules, than to run them as they are."""
    lengths = [len(stack) for stack in outline.stacks]
    ways = [_growths(lengths, limit) for limit in sorted({SHALLOW, *lengths})]

    def modules(depths: list[int]) -> int:
        return outline.around + sum(n * size for n, size in zip(depths, outline.sizes))

    return min(ways, key=lambda way: sum(modules(depths) for depths in (way[0], *(deeper for deeper, _ in way[1]))))


def _growths(lengths: list[int], limit: int) -> tuple[list[int], list[tuple[list[int], int]]]:
    """With stacks of up to ``limit`` blocks whole. Those that have the same number to go grow together."""
    kept = [n if n <= limit else SHALLOW for n in lengths]
    left = [n - k for n, k in zip(lengths, kept)]
    steps = sorted({0, *left})
    return kept, [([k + (n > less) for k, n in zip(kept, left)], more - less) for less, more in pairwise(steps)]


@dataclass(frozen=True)
class _Outline:
    """A network at full depth."""

    stacks: list[list[str]]
    """Names of its blocks, those together that follow each other and are alike, adapters included."""
    recomputed: list[bool]
    """Of each stack: whether its blocks are checkpointed, which the first ones are."""
    targets: dict[str, Target]
    """Adapted layer -> its own line of a recipe."""
    dense: list[str]
    """Linears that are not quantized."""
    sizes: list[int]
    """Modules of a block of each stack."""
    around: int
    """Modules around the blocks."""


def _outline(case: Case) -> _Outline:
    recipe, family = case.recipe, case.family
    denoiser = family.full_size(recipe.model).denoiser
    shapes, linears = adaptable(denoiser), linear_names(denoiser)
    presets = family.presets(denoiser)
    resolved = resolve_targets(recipe.adapter, shapes, presets, recipe.where) if recipe.adapter else []
    full = {"lokr": "full"}.get(recipe.adapter.kind if recipe.adapter else "")
    targets = {t.name: Target(pattern=t.name, factor=t.factor, rank=t.rank or full) for t in resolved}
    dense = excluded(recipe.base.exclude, linears, recipe.where)
    names = {id(module): name for name, module in denoiser.named_modules()}

    blocks = family.blocks(denoiser)
    wanted = chosen(recipe.train.gradient_checkpointing, "train.gradient_checkpointing")
    again = {id(block) for block in (blocks if wanted is True else blocks[:wanted])}

    def kind(block: nn.Module) -> tuple[object, ...]:
        own = [(inner, f"{names[id(block)]}.{inner}") for inner in adaptable(block)]
        forms = [(inner, targets[n].factor, targets[n].rank) for inner, n in own if n in targets]
        kept = [inner for inner, n in own if n in dense]
        return (type(block), id(block) in again, forms, kept, [p.shape for p in block.parameters()])

    same = [list(alike) for _, alike in groupby(blocks, key=kind)]
    recomputed = [id(alike[0]) in again for alike in same]
    stacks = [[names[id(block)] for block in alike] for alike in same]
    sizes = [len(list(alike[0].modules())) for alike in same]
    around = len(names) - sum(size * len(alike) for size, alike in zip(sizes, same))
    return _Outline(stacks, recomputed, targets, sorted(dense), sizes, around)


def _measured(case: Case, outline: _Outline, depths: list[int]) -> Estimate:
    """The step of a network with so many blocks of each stack: of those that begin it, and those that end it."""
    recipe, components = case.recipe, case.family.full_size(case.recipe.model)
    denoiser, cut = components.denoiser, []
    for stack, depth in zip(outline.stacks, depths):
        first, last = stack[: (depth + 1) // 2], stack[len(stack) - depth // 2 :]
        cut.append([*first, *last])
        for name in stack[len(first) : len(stack) - len(last)]:
            _remove(denoiser, name)
    left = adaptable(denoiser).keys()
    checkpointed = sum(len(names) for names, again in zip(cut, outline.recomputed) if again)
    tables: dict[str, object] = {
        "base": recipe.base.model_copy(update={"exclude": [n for n in outline.dense if n in left]}),
        "train": recipe.train.model_copy(update={"gradient_checkpointing": all(outline.recomputed) or checkpointed or False}),
    }
    if recipe.adapter:
        targets = [target for name, target in outline.targets.items() if name in left]
        tables["adapter"] = recipe.adapter.model_copy(update={"targets": targets})
    meter = Meter("meta", GRANULE if case.card else 1, converts=not case.card)
    _name_places(denoiser, cut, meter)
    with shapes_alone(card=case.card):
        changed = recipe.model_copy(update=tables)
        trainer = prepared(replace(case, recipe=changed), components, "meta")
        run(trainer, meter, adds=make_plan(recipe).micro_steps > case.processes, preview=case.preview)
    sizes = [sum(p.nbytes for p in denoiser.get_submodule(names[0]).parameters()) for names in cut]
    held = reserved(meter.events) if case.card else 0
    return Estimate(meter.peaks(FORWARD), dict(meter.work), held, sizes, _in_hand(cut, sizes))


def _remove(net: nn.Module, name: str) -> None:
    """From the list it is in; the others keep their names."""
    parent, _, own = name.rpartition(".")
    del net.get_submodule(parent)._modules[own]


def _place(stack: int, at: int, depth: int) -> str:
    return f"{'first' if at == 0 else 'last' if at == depth - 1 else 'inner'} block of stack {stack + 1}"


def _in_hand(cut: list[list[str]], sizes: list[int]) -> dict[str, int]:
    found = {}
    for i, (stack, size) in enumerate(zip(cut, sizes)):
        for at in range(len(stack)):
            before = sizes[i - 1] if i and not at else size
            found[_place(i, at, len(stack))] = size + max(size, before)
    return found


def _name_places(net: nn.Module, cut: list[list[str]], meter: Meter) -> None:
    """Tell ``meter`` which block runs, forward and backward."""

    def say(place: str) -> Callable[..., None]:
        def said(*_: Any) -> None:
            meter.place = place

        return said

    def after(place: str) -> Callable[[nn.Module, Any, Any], None]:
        named = say(place)

        def hook(module: nn.Module, inputs: object, outputs: object) -> None:
            for tensor in tree_leaves(outputs):
                if isinstance(tensor, Tensor) and tensor.requires_grad and meter.phase == FORWARD:
                    tensor.register_hook(named)

        return hook

    for i, stack in enumerate(cut):
        for at, name in enumerate(stack):
            place = _place(i, at, len(stack))
            block = net.get_submodule(name)
            block.register_forward_pre_hook(say(place))
            block.register_forward_hook(after(place))
