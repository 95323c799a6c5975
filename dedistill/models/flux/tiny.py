"""A complete FLUX pipeline folder with very small random weights: the real classes and file layout, built offline."""

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from dedistill.models.tiny_parts import TEXT_DIM, tiny_clip, tiny_clip_tokenizer, tiny_t5, tiny_t5_tokenizer, tiny_vae


def write_tiny_flux(folder: Path, *, seed: int = 0, guidance: bool = False, layers: int = 1, single_layers: int = 2) -> None:
    """Write a pipeline folder that ``FluxPipeline.from_pretrained`` loads without a network; all weights follow ``seed``.

    guidance: shaped like FLUX.1-dev (guidance embedding, resolution-dependent shift) instead of schnell. layers,
    single_layers: blocks with two streams and with one. The VAE has the real 16 channels and 8 pixels per latent,
    the tokenizers the real special tokens and lengths (T5 512, CLIP 77). The global generator is left as it was.
    """
    t5_tokenizer, clip_tokenizer = tiny_t5_tokenizer(), tiny_clip_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = FluxPipeline(
            transformer=_transformer(guidance, layers, single_layers),
            text_encoder=tiny_clip(clip_tokenizer),
            text_encoder_2=tiny_t5(t5_tokenizer),
            vae=tiny_vae(),
            tokenizer=clip_tokenizer,
            tokenizer_2=t5_tokenizer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0 if guidance else 1.0, use_dynamic_shifting=guidance),
        )
    pipe.save_pretrained(folder)


def _transformer(guidance: bool, layers: int, single_layers: int) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=64,
        num_layers=layers,
        num_single_layers=single_layers,
        num_attention_heads=2,
        attention_head_dim=16,
        axes_dims_rope=(4, 6, 6),
        joint_attention_dim=TEXT_DIM,
        pooled_projection_dim=TEXT_DIM,
        guidance_embeds=guidance,
    )
