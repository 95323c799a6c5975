"""A complete pipeline folder of a U-Net with very small random weights: the real classes and file layout, built offline."""

from pathlib import Path
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextModelWithProjection

from dedistill.models.tiny_parts import TEXT_DIM, tiny_clip, tiny_clip_tokenizer, tiny_vae

HEADS = 2
TIME = 8
"""Width of each of the six numbers of a size condition."""


def write_tiny_unet(
    folder: Path, published: dict[str, Any], *, seed: int = 0, full_depth: bool = False, prediction: str = "epsilon"
) -> None:
    """Write a pipeline folder that diffusers loads without a network; all weights follow ``seed``.

    published: config.json of the network it is like, of which it keeps everything but widths and, without full_depth, more than
    two transformer blocks in a row. prediction: as a scheduler says it. The global generator is left as it was.
    """
    tokenizer, two = tiny_clip_tokenizer(), published.get("addition_embed_type") == "text_time"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts: dict[str, Any] = {
            "unet": _unet(published, two=two, full_depth=full_depth),
            "text_encoder": tiny_clip(tokenizer),
            "tokenizer": tokenizer,
            "vae": tiny_vae(4, 0.13025 if two else 0.18215, None, quant=True),
            "scheduler": EulerDiscreteScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction, steps_offset=1
            ),
        }
        if two:
            second = {"text_encoder_2": tiny_clip(tokenizer, CLIPTextModelWithProjection), "tokenizer_2": tokenizer}
            pipe = StableDiffusionXLPipeline(**parts, **second, add_watermarker=False)
        else:
            pipe = StableDiffusionPipeline(
                **parts, safety_checker=None, feature_extractor=None, image_encoder=None, requires_safety_checker=False
            )
    pipe.save_pretrained(folder)


def _unet(published: dict[str, Any], *, two: bool, full_depth: bool) -> UNet2DConditionModel:
    kept = ("down_block_types", "up_block_types", "use_linear_projection", "addition_embed_type")
    config = {key: published[key] for key in kept if key in published}
    levels, width = len(published["block_out_channels"]), TEXT_DIM * (2 if two else 1)
    depths = published.get("transformer_layers_per_block", 1)
    if not full_depth and not isinstance(depths, int):
        depths = [min(2, n) for n in depths]
    added = {"addition_time_embed_dim": TIME, "projection_class_embeddings_input_dim": TEXT_DIM + 6 * TIME}
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=[8 * min(2, i + 1) for i in range(levels)],
        attention_head_dim=HEADS,  # of heads, in spite of its name
        cross_attention_dim=width,
        transformer_layers_per_block=depths,
        norm_num_groups=4,
        **config,
        **(added if two else {}),
    )
