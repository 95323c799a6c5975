"""Model families by name: what each provides, where its code lives, and its names and defaults. Imported when asked for."""

from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING

from dedistill.errors import UserError

if TYPE_CHECKING:
    from dedistill.models.family import Family
from types import ModuleType
from typing import Any

from dedistill.models.flux.published import shape_of
from dedistill.recipe.schema import Model

# --- family names and where their code lives -------------------------------------------------------------------------


FAMILIES = {"flux": "dedistill.models.flux.family:Flux", "pixel_flux": "dedistill.models.pixel_flux:PixelFlux"}


def get_family(name: str, where: str = "model.family") -> "Family":
    """The family called ``name``; ``where`` is the place in the recipe, for the error."""
    if name not in FAMILIES:
        near = get_close_matches(name, FAMILIES, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(FAMILIES)}"
        raise UserError(f"{where}: unknown family '{name}', {hint}", exit_code=2)
    module, _, cls = FAMILIES[name].partition(":")
    return getattr(import_module(module), cls)()


def text_length(family: "Family", asked: int, where: str = "model.text_length") -> int:
    """``asked`` tokens a caption is padded or cut to. Raises UserError for more than the family's text encoder takes."""
    if asked > family.max_text_length:
        raise UserError(f"{where}: {asked} tokens; {family.name} takes at most {family.max_text_length}", exit_code=2)
    return asked


# --- which other names a network's layers go by, found by the class that its config.json names -----------------------


_TABLES = {"FluxTransformer2DModel": "dedistill.models.flux.naming"}
_DEFAULT = "FluxTransformer2DModel"


def naming_of(network_class: str) -> ModuleType:
    """The key tables of a diffusers class: bfl_parts, bfl_name, bfl_plan, join, kohya_name."""
    if network_class not in _TABLES:
        raise UserError(f"no key tables for '{network_class}'; known: {', '.join(_TABLES)}")
    return import_module(_TABLES[network_class])


def published_config(source: str, *, guidance: bool = False) -> dict[str, Any]:
    """A denoiser's config.json, full size, for a published hub id; FLUX.1-schnell's for any other ``source``.

    guidance: with a guidance embedding, whatever the table says.
    """
    shape = shape_of(source)
    sizes = {"num_layers": shape.layers, "num_single_layers": shape.single_layers}
    return {"_class_name": _DEFAULT, **sizes, "guidance_embeds": guidance or shape.guidance}


# --- what a recipe's keys are by default in each family, as its [model] table alone tells ----------------------------


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
