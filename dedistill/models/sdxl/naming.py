"""What other programs call the layers of Stable Diffusion XL."""

from dedistill.models.unet.naming import LdmNames

NAMES = LdmNames(up_with_attention=(True, True, False), kohya_original=True)
