"""Stable Diffusion 1.5: one CLIP, and nothing beside its tokens."""

from dedistill.models.sd15 import SPEC
from dedistill.models.unet.family import UNetFamily


class StableDiffusion15(UNetFamily):
    spec = SPEC
    encoders = 1
