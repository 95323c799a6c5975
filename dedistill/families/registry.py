"""Family names and where their code lives; imported only when asked for."""

from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING

from dedistill.errors import UserError

if TYPE_CHECKING:
    from dedistill.families.family import Family

FAMILIES = {"flux": "dedistill.families.flux:Flux", "pixel_flux": "dedistill.families.pixel_flux:PixelFlux"}


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
