"""FLUX.1: schnell, dev, Flex.1-alpha, LibreFLUX, OpenFLUX, and what was cut from them."""

from dedistill.models.flux import published
from dedistill.models.spec import ModelSpec

SPEC = ModelSpec(
    name="flux",
    family="dedistill.models.flux.family:Flux",
    networks={published.NETWORK: f"diffusers:{published.NETWORK}"},
    architecture="flux-1",
    defaults=published.defaults,
    defaults_before=published.defaults_before,
    published=published.PUBLISHED,
    base_of=published.base_of,
    image_prompts=published.REDUX,
    full_config=published.full_config,
    shift=published.own_shift,
    distilled_guidance=published.has_guidance,
    names="dedistill.models.flux.naming:NAMES",
    card="dedistill.models.flux:card.md.j2",
)
