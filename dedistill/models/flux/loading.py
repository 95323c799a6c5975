"""FLUX's denoiser read from its files, with diffusers' or BFL's names."""

from pathlib import Path
from typing import Any

from diffusers import FluxTransformer2DModel
from torch import Tensor

from dedistill.errors import UserError
from dedistill.io.json_files import read_object
from dedistill.models.flux.naming import NAMES
from dedistill.models.network_files import as_deep, build, depth, read_network, stored_config
from dedistill.models.original_names import from_original
from dedistill.models.pretrained import check_finite, without_weights


def load_transformer(place: Path, components: Path, *, empty: bool = False) -> FluxTransformer2DModel:
    """The denoiser in its stored dtype, from diffusers' folder or from one file with diffusers' or BFL's names.

    Its depth is what the files hold. empty: on the meta device, by the files' headers alone.
    Raises UserError when a tensor is missing, unknown, of another shape, or not made of finite numbers.
    """
    tensors = read_network(place, empty=empty)
    if place.is_file():
        denoiser = _from_file(tensors, place, components)
    else:
        stacks = {"num_layers": "transformer_blocks", "num_single_layers": "single_transformer_blocks"}
        config = as_deep(stored_config(place), tensors, stacks, place)
        denoiser = build(FluxTransformer2DModel, config, tensors, str(place))
    if not empty:
        check_finite(tensors, f"model.path: '{place}'")
    return denoiser


def _from_file(tensors: dict[str, Tensor], file: Path, components: Path) -> FluxTransformer2DModel:
    bfl = any(name.startswith("double_blocks.") for name in tensors)
    config = _config_of(tensors, _BFL_SIZES if bfl else _SIZES, str(file), components)
    if bfl:
        shapes = {n: tuple(p.shape) for n, p in empty_network(config, str(file)).named_parameters()}
        tensors = from_original(NAMES, tensors, shapes, str(file))
    return build(FluxTransformer2DModel, config, tensors, str(file))


_SIZES = {
    "stacks": ("transformer_blocks", "single_transformer_blocks"),
    "image": "x_embedder.weight",
    "text": "context_embedder.weight",
    "pooled": "time_text_embed.text_embedder.linear_1.weight",
    "head": "transformer_blocks.0.attn.norm_q.weight",
    "guidance": "time_text_embed.guidance_embedder.linear_1.weight",
}
_BFL_SIZES = {
    "stacks": ("double_blocks", "single_blocks"),
    "image": "img_in.weight",
    "text": "txt_in.weight",
    "pooled": "vector_in.in_layer.weight",
    "head": "double_blocks.0.img_attn.norm.query_norm.scale",
    "guidance": "guidance_in.in_layer.weight",
}
"""Which tensors tell a network's sizes, by either set of names."""


def _config_of(tensors: dict[str, Tensor], names: dict[str, Any], source: str, components: Path) -> dict[str, Any]:
    """The config of a network from the shapes of its tensors; what shapes cannot tell from the folder of its components."""
    if missing := [names[k] for k in ("image", "text", "pooled", "head") if names[k] not in tensors]:
        raise UserError(f"model.path: '{source}' is not a FLUX denoiser: it has no tensor '{missing[0]}'")
    for key, dimensions in (("image", 2), ("text", 2), ("pooled", 2), ("head", 1)):
        if tensors[names[key]].ndim != dimensions:
            raise UserError(f"model.path: '{source}': '{names[key]}' has the shape {tuple(tensors[names[key]].shape)}")
    hidden, channels = tensors[names["image"]].shape
    head = tensors[names["head"]].shape[0]
    beside = components / "transformer" / "config.json"
    known = read_object(beside, "model.path") if beside.exists() else {}
    axes = known.get("axes_dims_rope", [16, 56, 56])
    if not isinstance(axes, list) or not all(isinstance(n, int) for n in axes) or not head or sum(axes) != head:
        raise UserError(f"model.path: '{source}' has heads of {head}; positions of {axes} do not fit them")
    return {
        "num_layers": depth(tensors, names["stacks"][0], source),
        "num_single_layers": depth(tensors, names["stacks"][1], source),
        "in_channels": channels,
        "num_attention_heads": hidden // head,
        "attention_head_dim": head,
        "joint_attention_dim": tensors[names["text"]].shape[1],
        "pooled_projection_dim": tensors[names["pooled"]].shape[1],
        "guidance_embeds": names["guidance"] in tensors,
        "axes_dims_rope": list(axes),
    }


def empty_network(config: dict[str, Any], source: str) -> FluxTransformer2DModel:
    """On the meta device."""
    return without_weights(FluxTransformer2DModel, config, f"model.path: '{source}'")
