"""Between a network's own names and those of its published repository, where some tensors are fused."""

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from dedistill.adapters.spellings import LayerNames, swap_halves
from dedistill.errors import UserError, amount


def rows_of(
    linear: str, shapes: Mapping[str, tuple[int, ...]], original_parts: Callable[[str], tuple[str, tuple[str, ...]]]
) -> tuple[str, slice]:
    """Where the original files keep the weight of ``linear``: the module's name and the rows of its weight; of one whose halves
    are swapped there, all rows.

    shapes: name -> (out, in) of every linear. original_parts: the original module that holds a linear, and all linears that it
    holds, in the order of its rows.
    """
    original, parts = original_parts(linear)
    start = sum(shapes[part][0] for part in parts[: parts.index(linear)])
    return original, slice(start, start + shapes[linear][0])


def fused_plan(names: Iterable[str], original: Callable[[str], tuple[str, tuple[str, ...]]]) -> dict[str, tuple[str, ...]]:
    """As LayerNames.original_plan. original: the original tensor that holds one of ``names``, and all that it holds.

    Raises UserError for a fused tensor of which a part is missing.
    """
    names = list(names)
    plan = dict(map(original, names))
    if missing := sorted({part for parts in plan.values() for part in parts} - set(names)):
        raise UserError(
            f"{amount(len(missing), 'tensor is', 'tensors are')} missing beside those they are fused with, e.g. '{missing[0]}'"
        )
    return plan


def from_original(
    naming: LayerNames, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], source: str
) -> dict[str, Tensor]:
    """The inverse of ``naming.join`` for a network whose tensors have ``shapes``: all of them, cut from original ones.

    Raises UserError, naming ``source``, unless the two sets of names agree exactly.
    """
    plan = naming.original_plan(shapes)
    for names, what in ((plan.keys() - tensors.keys(), "missing"), (tensors.keys() - plan.keys(), "unknown")):
        if names:
            raise UserError(
                f"model.path: '{source}': {amount(len(names), 'tensor is', 'tensors are')} {what}, e.g. {min(names)}"
            )
    found: dict[str, Tensor] = {}
    for original, parts in plan.items():
        tensor, sizes = tensors[original], [shapes[part][0] for part in parts]
        if tensor.shape[0] != sum(sizes):
            raise UserError(f"model.path: '{source}': '{original}' has {tensor.shape[0]} rows, expected {sum(sizes)}")
        tensor = swap_halves(tensor) if naming.is_swapped(original.rpartition(".")[0], shapes) else tensor
        found |= zip(parts, tensor.split(sizes))
    return found
