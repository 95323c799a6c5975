"""A complete SD3.5 pipeline folder with very small random weights: the real classes and file layout, built offline."""

from collections.abc import Collection
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextModelWithProjection

from dedistill.models.sd3.published import SHIFT
from dedistill.models.tiny_parts import TEXT_DIM, tiny_clip, tiny_clip_tokenizer, tiny_t5, tiny_t5_tokenizer, tiny_vae

CLIP_DIMS = (12, 16)
POSITIONS = 24
"""Side of the table of positions, in patches: up to 384 pixels."""


def write_tiny_sd3(
    folder: Path, *, seed: int = 0, layers: int = 3, dual: int = 1, without: Collection[str] = (), positions: int = POSITIONS
) -> None:
    """Write a pipeline folder that ``StableDiffusion3Pipeline.from_pretrained`` loads without a network; all weights follow
    ``seed``.

    dual: the first blocks in which the image attends to itself once more, as in medium. without: folders of text encoders
    that are left out, as a pipeline without them saves itself. The VAE has the real 16 channels and 8 pixels per latent, the
    tokenizers the real special tokens and lengths. The global generator is left as it was.
    """
    t5_tokenizer, clip_tokenizer = tiny_t5_tokenizer(), tiny_clip_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = SD3Transformer2DModel(
            sample_size=128,
            num_layers=layers,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=TEXT_DIM,
            caption_projection_dim=32,
            pooled_projection_dim=sum(CLIP_DIMS),
            pos_embed_max_size=positions,
            dual_attention_layers=tuple(range(dual)),
            qk_norm="rms_norm",
        )
        clips = [tiny_clip(clip_tokenizer, CLIPTextModelWithProjection, width) for width in CLIP_DIMS]
        encoders = dict(zip(("", "_2", "_3"), (*clips, tiny_t5(t5_tokenizer))))
        vae = tiny_vae(scale=1.5305, shift=0.0609)
    parts = {}
    for ending, tokenizer in zip(encoders, (clip_tokenizer, clip_tokenizer, t5_tokenizer)):
        left_out = f"text_encoder{ending}" in without
        parts[f"text_encoder{ending}"] = None if left_out else encoders[ending]
        parts[f"tokenizer{ending}"] = None if left_out else tokenizer
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    StableDiffusion3Pipeline(transformer=transformer, vae=vae, scheduler=scheduler, **parts).save_pretrained(folder)
