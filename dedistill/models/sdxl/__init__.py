"""Stable Diffusion XL, its turbo, and what was fine-tuned from them."""

from typing import Any

from dedistill.models.spec import Config, Licence, ModelSpec, Published
from dedistill.models.unet import has_scale_embedding
from dedistill.recipe.model_tables import Model

_HUB = "https://huggingface.co/stabilityai"
OPENRAIL = Licence("openrail++", link=f"{_HUB}/stable-diffusion-xl-base-1.0/blob/main/LICENSE.md", binding=True)
TURBO = Licence("other", "sai-nc-community", f"{_HUB}/sdxl-turbo/blob/main/LICENSE.md", binding=True)
SIDE = 1024


def full_config(source: str, guidance: bool) -> dict[str, Any]:
    """config.json of the published networks; all of them have one shape."""
    return {
        "_class_name": "UNet2DConditionModel",
        **{"sample_size": 128, "in_channels": 4, "out_channels": 4, "layers_per_block": 2, "cross_attention_dim": 2048},
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "use_linear_projection": True,
        **{"addition_embed_type": "text_time", "addition_time_embed_dim": 256},
        "projection_class_embeddings_input_dim": 2816,
    }


def _has(config: Config) -> bool:
    return config.get("addition_embed_type") == "text_time"


def _defaults(model: Model) -> dict[str, Any]:
    side = 512 if "turbo" in (model.path or "").lower() else SIDE
    own = {"model.text_length": 77, "model.mask": "none", "model.t5_mask": False, "model.null": "zeros"}
    return own | {"sample.height": side, "sample.width": side}


SPEC = ModelSpec(
    name="sdxl",
    family="dedistill.models.sdxl.family:StableDiffusionXL",
    networks={"UNet2DConditionModel": "diffusers:UNet2DConditionModel"},
    has=_has,
    architecture="stable-diffusion-xl-v1-base",
    folder="unet",
    prediction="epsilon",
    resolution=SIDE,
    defaults=_defaults,
    published=(
        Published("stabilityai/stable-diffusion-xl-base-1.0", OPENRAIL, "stable-diffusion-xl-v1-base"),
        Published(
            "stabilityai/sdxl-turbo", TURBO, "stable-diffusion-xl-turbo", parent="stabilityai/stable-diffusion-xl-base-1.0"
        ),
    ),
    full_config=full_config,
    distilled_guidance=has_scale_embedding,
    names="dedistill.models.sdxl.naming:NAMES",
    card="dedistill.models.unet:card.md.j2",
)
