"""Stable Diffusion 3.5: medium, large, large-turbo, and what was made from them."""

from dedistill.models.sd3 import published
from dedistill.models.spec import ModelSpec

SPEC = ModelSpec(
    name="sd3",
    family="dedistill.models.sd3.family:Sd3",
    networks={published.NETWORK: f"diffusers:{published.NETWORK}"},
    architecture="stable-diffusion-3.5",
    defaults=published.defaults,
    published=published.PUBLISHED,
    base_of=published.base_of,
    full_config=published.full_config,
    shift=published.own_shift,
    names="dedistill.models.sd3.naming:NAMES",
    card="dedistill.models.sd3:card.md.j2",
)
