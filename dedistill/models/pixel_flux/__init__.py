"""FLUX in pixel space, for small images: the network of the laboratory's recipes."""

from dedistill.models.flux import published
from dedistill.models.spec import ModelSpec

SPEC = ModelSpec(
    name="pixel_flux",
    family="dedistill.models.pixel_flux.family:PixelFlux",
    networks={published.NETWORK: f"diffusers:{published.NETWORK}"},
    architecture="pixel-flux",
    resolution=32,
    defaults=lambda model: {"model.text_length": 12, "sample.shift": 1.0},
    defaults_before=lambda model: {"model.text_length": 12},
    names="dedistill.models.flux.naming:NAMES",
)
