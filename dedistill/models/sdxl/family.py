"""Stable Diffusion XL: two CLIPs, and beside their tokens the second's vector and how the image was framed."""

import torch
from torch import Tensor

from dedistill.models.conditioning import Conditioning
from dedistill.models.sdxl import SPEC
from dedistill.models.unet.family import UNetFamily


class StableDiffusionXL(UNetFamily):
    spec = SPEC
    encoders = 2

    def added(self, text: Conditioning, noisy: Tensor, scale: int) -> dict[str, Tensor]:
        """Pooled text and six numbers of each image: in training its own, else those of a whole one of that size."""
        framing = text.framing
        if framing is None:
            framing = torch.zeros(len(noisy), 6, device=noisy.device)
            framing[:, 0::4], framing[:, 1::4] = noisy.shape[2] * scale, noisy.shape[3] * scale
        # float32: bf16 knows no number of four digits, and the network casts what it makes of them itself
        return {"text_embeds": text.vectors["pooled"], "time_ids": framing}
