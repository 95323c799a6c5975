"""What runs on a device beside training: the published encoders and codec at full size, as shapes alone."""

from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from dedistill.io.json_files import read_object
from dedistill.models.family import Pass
from dedistill.models.prompts import CHUNK, CLIP_TOKENS
from dedistill.models.unet.encoders import TWO
from dedistill.models.vae import vae_passes

CLIPS: tuple[dict[str, Any], ...] = (
    {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    {
        **{"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20},
        **{"projection_dim": 1280, "hidden_act": "gelu"},
    },
)
"""CLIP ViT-L/14's and OpenCLIP ViT-bigG/14's text models, as the config.json files of SDXL say."""


def passes(folder: Path, encoders: int, height: int, width: int) -> dict[str, Pass]:
    """By name what is run, of modules on the device that is the default now. folder: the pipeline's; sizes of what is not
    there are the published ones. height, width: of an image in pixels."""
    clips: list[Any] = []
    for encoder, published, kind in zip(TWO.values(), CLIPS, (CLIPTextModel, CLIPTextModelWithProjection)):
        file = folder / encoder.folder / "config.json"
        config = CLIPTextConfig(**(read_object(file, "model.path") if file.exists() else published))
        clips.append(kind(config).to(torch.bfloat16).eval())
    used = clips[:encoders]

    def captions() -> object:
        tokens = torch.ones(CHUNK, CLIP_TOKENS, dtype=torch.long)
        return [clip(tokens, output_hidden_states=True).hidden_states[-2] for clip in used]

    return {"encoding captions": Pass(used, captions)} | vae_passes(folder / "vae", height, width, 4)
