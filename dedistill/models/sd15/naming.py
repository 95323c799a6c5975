"""What other programs call the layers of Stable Diffusion 1.5."""

from dedistill.models.unet.naming import LdmNames

NAMES = LdmNames(up_with_attention=(False, True, True, True), kohya_original=False)
