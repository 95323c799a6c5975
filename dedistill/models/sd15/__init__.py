"""Stable Diffusion 1.5, and what was fine-tuned from it."""

from typing import Any

from dedistill.models.spec import Config, Licence, ModelSpec, Published
from dedistill.models.unet import has_scale_embedding
from dedistill.recipe.model_tables import Model

OPENRAIL = Licence(
    "creativeml-openrail-m",
    link="https://huggingface.co/spaces/CompVis/stable-diffusion-license",
    binding=True,
)
CC_BY_NC = Licence("cc-by-nc-4.0", binding=True)
SIDE = 512


def full_config(source: str, guidance: bool) -> dict[str, Any]:
    """config.json of the published network; all of them have one shape."""
    return {
        "_class_name": "UNet2DConditionModel",
        **{"sample_size": 64, "in_channels": 4, "out_channels": 4, "layers_per_block": 2, "cross_attention_dim": 768},
        "block_out_channels": [320, 640, 1280, 1280],
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "attention_head_dim": 8,
    }


def _has(config: Config) -> bool:
    return config.get("addition_embed_type") is None and config.get("class_embed_type") is None


def _defaults(model: Model) -> dict[str, Any]:
    own = {"model.text_length": 77, "model.mask": "none", "model.t5_mask": False, "model.null": "empty"}
    return own | {"sample.height": SIDE, "sample.width": SIDE}


SPEC = ModelSpec(
    name="sd15",
    family="dedistill.models.sd15.family:StableDiffusion15",
    networks={"UNet2DConditionModel": "diffusers:UNet2DConditionModel"},
    has=_has,
    architecture="stable-diffusion-v1",
    folder="unet",
    prediction="epsilon",
    resolution=SIDE,
    defaults=_defaults,
    published=(
        Published("stable-diffusion-v1-5/stable-diffusion-v1-5", OPENRAIL, "stable-diffusion-v1"),
        Published("runwayml/stable-diffusion-v1-5", OPENRAIL, "stable-diffusion-v1"),
        *(
            Published(f"XCLiu/{name}_from_sd_1_5", CC_BY_NC, "stable-diffusion-v1", prediction="negative_velocity")
            for name in ("2_rectified_flow", "instaflow_0_9B")
        ),
    ),
    full_config=full_config,
    distilled_guidance=has_scale_embedding,
    names="dedistill.models.sd15.naming:NAMES",
    card="dedistill.models.unet:card.md.j2",
)
