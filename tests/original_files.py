"""A network's tensors as the files of its own repository have them."""

from collections.abc import Mapping

from torch import Tensor

from dedistill.adapters.naming import LayerNames


def as_original(naming: LayerNames, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    plan = naming.original_plan(tensors)
    return {name: naming.join(name, [tensors[part] for part in parts], tensors) for name, parts in plan.items()}
