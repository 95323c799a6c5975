"""Which other names a network's layers go by, found by the class that its config.json names."""

from importlib import import_module
from types import ModuleType

from dedistill.errors import UserError

_TABLES = {"FluxTransformer2DModel": "dedistill.families.flux_keys"}
DEFAULT_CLASS = "FluxTransformer2DModel"
"""What a file is taken for when it does not say."""


def naming_of(network_class: str) -> ModuleType:
    """The key tables of a diffusers class: bfl_parts, bfl_name, bfl_plan, join, kohya_name."""
    if network_class not in _TABLES:
        raise UserError(f"no key tables for '{network_class}'; known: {', '.join(_TABLES)}")
    return import_module(_TABLES[network_class])
