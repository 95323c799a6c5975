"""What runs on a device beside training: the published encoders and codec at full size, as shapes alone."""

from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from dedistill.io.json_files import read_object
from dedistill.models.family import CAPTIONS, Pass
from dedistill.models.prompts import CHUNK, CLIP_TOKENS
from dedistill.models.vae import vae_passes

T5 = {
    **{"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128},
    "feed_forward_proj": "gated-gelu",
}
CLIP = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
"""Sizes of T5 v1.1 XXL's encoder and CLIP ViT-L/14's text model, as the config.json of FLUX.1-schnell says."""


def passes(folder: Path, height: int, width: int, length: int) -> dict[str, Pass]:
    """By name what is run, of modules on the device that is the default now. folder: the pipeline's; sizes of what is not
    there are the published ones. height, width: of an image in pixels; length: tokens of a caption."""
    t5 = T5EncoderModel(T5Config(**_config(folder / "text_encoder_2", T5))).to(torch.bfloat16).eval()
    clip = CLIPTextModel(CLIPTextConfig(**_config(folder / "text_encoder", CLIP))).to(torch.bfloat16).eval()

    def captions() -> object:
        tokens = torch.ones(CHUNK, length, dtype=torch.long)
        return clip(tokens[:, :CLIP_TOKENS]).pooler_output, t5(tokens, attention_mask=tokens).last_hidden_state

    return {CAPTIONS: Pass([t5, clip], captions)} | vae_passes(folder / "vae", height, width, channels=16)


def _config(folder: Path, published: dict[str, Any]) -> dict[str, Any]:
    file = folder / "config.json"
    return read_object(file, "model.path") if file.exists() else published
