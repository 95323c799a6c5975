"""SD3.5's denoiser read from its files, with diffusers' or Stability AI's names."""

import math
from pathlib import Path
from typing import Any

from diffusers import SD3Transformer2DModel
from torch import Tensor

from dedistill.errors import UserError
from dedistill.models.network_files import as_deep, build, depth, read_network, stored_config
from dedistill.models.original_names import from_original
from dedistill.models.pretrained import check_finite, without_weights
from dedistill.models.sd3.naming import NAMES


def load_transformer(place: Path, *, empty: bool = False) -> SD3Transformer2DModel:
    """The denoiser in its stored dtype, from diffusers' folder or from one file. Its depth is what the files hold.

    empty: on the meta device, by the files' headers alone. Raises UserError when a tensor is missing, unknown, of another
    shape, or not made of finite numbers.
    """
    tensors = read_network(place, empty=empty)
    if place.is_file():
        denoiser = _from_file(tensors, str(place))
    else:
        config = as_deep(stored_config(place), tensors, {"num_layers": "transformer_blocks"}, place)
        denoiser = build(SD3Transformer2DModel, config, tensors, str(place))
    if not empty:
        check_finite(tensors, f"model.path: '{place}'")
    return denoiser


_SIZES = {
    "stack": "transformer_blocks",
    "image": "pos_embed.proj.weight",
    "positions": "pos_embed.pos_embed",
    "text": "context_embedder.weight",
    "pooled": "time_text_embed.text_embedder.linear_1.weight",
    "out": "proj_out.weight",
    "head": "transformer_blocks.{}.attn.norm_q.weight",
    "dual": "transformer_blocks.{}.attn2.{}",
}
_ORIGINAL_SIZES = {
    "stack": "joint_blocks",
    "image": "x_embedder.proj.weight",
    "positions": "pos_embed",
    "text": "context_embedder.weight",
    "pooled": "y_embedder.mlp.0.weight",
    "out": "final_layer.linear.weight",
    "head": "joint_blocks.{}.x_block.attn.ln_q.weight",
    "dual": "joint_blocks.{}.x_block.attn2.{}",
}
"""Which tensors tell a network's sizes, by either set of names."""


def _from_file(tensors: dict[str, Tensor], source: str) -> SD3Transformer2DModel:
    original = any(name.startswith("joint_blocks.") for name in tensors)
    config = _config_of(tensors, _ORIGINAL_SIZES if original else _SIZES, source)
    if original:
        empty = without_weights(SD3Transformer2DModel, config, f"model.path: '{source}'")
        shapes = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}
        tensors = from_original(NAMES, tensors, shapes, source)
    return build(SD3Transformer2DModel, config, tensors, source)


def _config_of(tensors: dict[str, Tensor], names: dict[str, str], source: str) -> dict[str, Any]:
    """The config of a network from the shapes of its tensors. SD3.5 has normalised queries; without them it is SD3."""
    shapes: dict[str, tuple[int, ...]] = {}
    for key, dimensions in (("image", 4), ("positions", 3), ("text", 2), ("pooled", 2), ("out", 2), ("head", 1)):
        name = names[key].format(0)
        if name not in tensors or tensors[name].ndim != dimensions:
            raise UserError(f"model.path: '{source}' is not a denoiser of SD3.5: it has no tensor '{name}' of its kind")
        shapes[key] = tuple(tensors[name].shape)
    blocks, (hidden, channels, patch, _), (head,) = depth(tensors, names["stack"], source), shapes["image"], shapes["head"]
    dual = [i for i in range(blocks) if any(name.startswith(names["dual"].format(i, "")) for name in tensors)]
    return {
        "num_layers": blocks,
        "num_attention_heads": hidden // head if head else 0,
        "attention_head_dim": head,
        "in_channels": channels,
        "out_channels": shapes["out"][0] // patch**2 if patch else 0,
        "patch_size": patch,
        "joint_attention_dim": shapes["text"][1],
        "caption_projection_dim": shapes["text"][0],
        "pooled_projection_dim": shapes["pooled"][1],
        "pos_embed_max_size": math.isqrt(shapes["positions"][1]),
        "dual_attention_layers": dual,
        "qk_norm": "rms_norm",
    }
