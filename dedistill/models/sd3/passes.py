"""What runs on a device beside training: the published encoders and codec at full size, as shapes alone."""

from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from dedistill.io.json_files import read_object
from dedistill.models.family import Pass
from dedistill.models.prompts import CHUNK, CLIP_TOKENS
from dedistill.models.sd3.encoders import ENCODERS
from dedistill.models.vae import vae_passes

PUBLISHED: dict[str, dict[str, Any]] = {
    "clip_l": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "clip_g": {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20},
    "t5": {
        **{"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128},
        "feed_forward_proj": "gated-gelu",
    },
}
"""Sizes of the text encoders, as the config.json files of SD3.5 say."""


def passes(folder: Path, height: int, width: int, length: int) -> dict[str, Pass]:
    """By name what is run, of modules on the device that is the default now. folder: the pipeline's; where it is not there,
    sizes are the published ones. height, width: of an image in pixels; length: T5 tokens of a caption."""
    configs = {name: folder / encoder.folder / "config.json" for name, encoder in ENCODERS.items()}
    there = any(file.exists() for file in configs.values())
    sizes = {
        name: read_object(file, "model.path") if there else PUBLISHED[name]
        for name, file in configs.items()
        if file.exists() or not there
    }
    networks = {
        name: T5EncoderModel(T5Config(**size)) if name == "t5" else CLIPTextModelWithProjection(CLIPTextConfig(**size))
        for name, size in sizes.items()
    }
    for network in networks.values():
        network.to(torch.bfloat16).eval()

    def captions() -> object:
        tokens = {name: torch.ones(CHUNK, length if name == "t5" else CLIP_TOKENS, dtype=torch.long) for name in networks}
        return [network(tokens[name], output_hidden_states=name != "t5") for name, network in networks.items()]

    encoding = {"encoding captions": Pass([*networks.values()], captions)}
    return encoding | vae_passes(folder / "vae", height, width, channels=16)
