"""Which other names a network's layers go by, found by the class that its config.json names."""

from importlib import import_module
from types import ModuleType
from typing import Any

from dedistill.errors import UserError
from dedistill.families.flux_models import shape_of

_TABLES = {"FluxTransformer2DModel": "dedistill.families.flux_keys"}
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
