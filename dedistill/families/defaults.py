"""What a recipe's keys are by default in each family, as its [model] table alone tells. No torch."""

from typing import Any

from dedistill.families.flux_models import shape_of
from dedistill.recipe.schema import Model

NUMBERS = {
    "flux": {"model.text_length": 512, "model.guidance": 1.0, "sample.height": 1024, "sample.width": 1024},
    "pixel_flux": {"model.text_length": 12},
}
BEFORE = {"flux": {"model.text_length": 512, "model.guidance": 1.0}, "pixel_flux": {"model.text_length": 12}}
"""Those of runs whose recipe.json does not hold them. They never change."""


def family_defaults(model: Model) -> dict[str, Any]:
    """Dotted keys of a recipe with such a [model] table, and their values; empty for an unknown family."""
    return _with_effect(NUMBERS.get(model.family, {}), model)


def defaults_before(model: Model) -> dict[str, Any]:
    """The same in runs that were started before recipe.json held them."""
    return _with_effect(BEFORE.get(model.family, {}), model)


def _with_effect(numbers: dict[str, Any], model: Model) -> dict[str, Any]:
    guided = "model.guidance" in numbers and model.path is not None and shape_of(model.path, model.revision).guidance
    return {key: value for key, value in numbers.items() if guided or key != "model.guidance"}
