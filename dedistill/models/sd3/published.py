"""Published models of SD3.5's shape: what is known of them before a byte is fetched."""

import re
from pathlib import Path
from typing import Any

from dedistill.errors import UserError
from dedistill.io.json_files import read_object
from dedistill.models import pipeline_files
from dedistill.models.spec import Config, Licence, Published
from dedistill.recipe.model_tables import Model

NETWORK = "SD3Transformer2DModel"
SHIFT = 3.0
"""Of sigma, of all of them, in training and for images."""
COMMUNITY = Licence(
    "other",
    "stabilityai-ai-community",
    "https://huggingface.co/stabilityai/stable-diffusion-3.5-large/blob/main/LICENSE.md",
    binding=True,
)


def _sizes(blocks: int, positions: int, dual: int) -> dict[str, Any]:
    """blocks: also heads of 64. positions: side of the table of positions, in patches. dual: the first blocks, in which the
    image attends to itself once more."""
    return {
        **{"num_layers": blocks, "num_attention_heads": blocks, "attention_head_dim": 64},
        **{"caption_projection_dim": 64 * blocks, "joint_attention_dim": 4096, "pooled_projection_dim": 2048},
        **{"sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "pos_embed_max_size": positions},
        **{"dual_attention_layers": list(range(dual)), "qk_norm": "rms_norm"},
    }


_HUB = "stabilityai/stable-diffusion-3.5"
LARGE = Published(f"{_HUB}-large", COMMUNITY, "stable-diffusion-3.5-large", _sizes(38, 192, 0), gated=True)
TURBO = Published(
    f"{_HUB}-large-turbo", COMMUNITY, "stable-diffusion-3.5-large-turbo", LARGE.sizes, gated=True, parent=LARGE.id
)
MEDIUM = Published(f"{_HUB}-medium", COMMUNITY, "stable-diffusion-3.5-medium", _sizes(24, 384, 13), gated=True)
PUBLISHED = (TURBO, LARGE, MEDIUM)
"""The longer name first."""


def base_of(published: tuple[Published, ...], source: str, config: Config) -> Published | None:
    """As ModelSpec.base_of: by a name in ``source``, as hub ids or the repositories' single files have it, else by the number
    of heads. Large and large-turbo have the same: without a name it is the former, of the same licence."""
    if named := _named(published, source):
        return named
    same = [p for p in published if p.sizes["num_attention_heads"] == config.get("num_attention_heads")]
    return same[-1] if same else None


def _named(published: tuple[Published, ...], source: str) -> Published | None:
    """sd3.5_large_turbo.safetensors is stable-diffusion-3.5-large-turbo."""
    plain = re.sub(r"[\W_]", "", source.lower()).replace("stablediffusion", "sd")
    return next((p for p in published if "sd35" + re.sub(r"\W", "", p.id.partition("3.5-")[2]) in plain), None)


def defaults(model: Model) -> dict[str, Any]:
    """Of a recipe, as ModelSpec.defaults: captions are read as the models were trained."""
    text = {"model.mask": "none", "model.t5_mask": False, "model.text_length": 256}
    return text | {"sample.height": 1024, "sample.width": 1024}


def own_shift(model: Model) -> float | None:
    """As ModelSpec.shift."""
    return pipeline_files.own_shift(model, SHIFT)


def full_config(source: str, guidance: bool) -> dict[str, Any]:
    """A denoiser's config.json, full size, for a published hub id; medium's for any other ``source``."""
    return {"_class_name": NETWORK} | dict((_named(PUBLISHED, source) or MEDIUM).sizes)


def config_of(path: str, revision: str | None = None) -> dict[str, Any]:
    """The sizes of a local folder by its config, of a published model by its name, of another hub id by its config there, else
    medium's. No weights are read or fetched."""
    place = Path(path)
    try:
        if (config := place / "transformer" / "config.json").exists():
            return full_config(path, False) | read_object(config)
        if not _named(PUBLISHED, path) and revision and not place.exists():
            return full_config(path, False) | read_object(pipeline_files.hub_config(path, revision, "transformer"))
    except (OSError, ValueError, UserError):
        pass  # whoever loads the weights says what is wrong with them
    return full_config(path, False)
