"""From the tensors of a model's own repository, some of which are fused, to those of its network."""

from collections.abc import Mapping

from torch import Tensor

from dedistill.adapters.naming import LayerNames, swap_halves
from dedistill.errors import UserError, amount


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
