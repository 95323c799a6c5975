"""The network that the ladder begins with: random, of the class and schedule of Stable Diffusion 1.5, one latent per pixel."""

from pathlib import Path

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel

from dedistill.models.tiny_parts import TEXT_DIM, tiny_clip, tiny_clip_tokenizer, tiny_vae


def write_start(folder: Path, seed: int) -> None:
    """A pipeline folder of the family sd15 for latents [1, 8, 16], which are the digits themselves; its VAE is never asked."""
    tokenizer = tiny_clip_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=[16, 32],
            down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
            up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
            layers_per_block=1,
            cross_attention_dim=TEXT_DIM,
            attention_head_dim=2,
            norm_num_groups=8,
        )
        parts = {"text_encoder": tiny_clip(tokenizer), "tokenizer": tokenizer, "vae": tiny_vae(1, 1.0, None, quant=True)}
    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    StableDiffusionPipeline(
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
        **parts,
    ).save_pretrained(folder)
