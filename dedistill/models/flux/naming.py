"""FLUX's layers by name: diffusers', Black Forest Labs' own, and named sets of them.

BFL fuses what diffusers keeps apart: q, k and v of a double block; q, k, v and the first MLP layer of a single block.
Its last modulation has rows (shift, scale), diffusers' has (scale, shift). Everything else is a change of names.
Sources: github.com/black-forest-labs/flux (src/flux/model.py), diffusers' single-file loader, which is the inverse.
"""

import re
from collections.abc import Collection
from typing import cast

from torch import nn

from dedistill.adapters.naming import TableNames

# --- FLUX's two sets of names ----------------------------------------------------------------------------------------


# BFL module -> diffusers modules, in the order of its rows
_TOP: dict[str, tuple[str, ...]] = {
    "img_in": ("x_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "txt_in": ("context_embedder",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
_DOUBLE: dict[str, tuple[str, ...]] = {
    "img_mod.lin": ("norm1.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mod.lin": ("norm1_context.linear",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
}
_SINGLE: dict[str, tuple[str, ...]] = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
}
_TABLES: dict[str, tuple[str, dict[str, tuple[str, ...]]]] = {
    "": ("", _TOP),
    "transformer_blocks": ("double_blocks", _DOUBLE),
    "single_transformer_blocks": ("single_blocks", _SINGLE),
}
_SWAPPED = "final_layer.adaLN_modulation.1"
# BFL module -> what else files call it, or its first parts: XLabs' attention processors, and ComfyUI's name for their rows
_OTHER: dict[str, dict[str, int]] = {
    "img_attn.qkv": {"processor.qkv_lora1": 3},
    "txt_attn.qkv": {"processor.qkv_lora2": 3},
    "img_attn.proj": {"processor.proj_lora1": 1},
    "txt_attn.proj": {"processor.proj_lora2": 1},
    "linear1": {"processor.qkv_lora": 3, "linear1_qkv": 3},
    "linear2": {"processor.proj_lora": 1},
}


class FluxNames(TableNames):
    TABLES = _TABLES
    UNKNOWN = "FLUX: it has no name in BFL's files"
    KOHYA_MODULE = "networks.lora_flux"
    KOHYA_LEAVES_OUT = "final_layer"
    DIFFUSERS_CONVERTS = True

    def original_tensor(self, name: str) -> tuple[str, tuple[str, ...]]:
        module, _, kind = name.rpartition(".")
        bfl, parts = self.original_parts(module)
        # BFL calls the weight of an RMSNorm its scale
        return f"{bfl}.{'scale' if bfl.endswith('_norm') else kind}", tuple(f"{part}.{kind}" for part in parts)

    def other_names(self, original: str) -> dict[str, int]:
        """What else files call a BFL module -> how many of its parts, from the first, they mean by it."""
        block = re.fullmatch(r"((?:double|single)_blocks\.\d+)\.(.+)", original)
        return {f"{block[1]}.{name}": count for name, count in _OTHER.get(block[2], {}).items()} if block else {}

    def is_swapped(self, original: str, network: Collection[str]) -> bool:
        """Whether the halves of this original module's rows stand the other way round than in diffusers."""
        return original == _SWAPPED


NAMES = FluxNames()


# --- named sets of layers of any network with FLUX's blocks, whatever its depth --------------------------------------


DOUBLE, SINGLE = "transformer_blocks", "single_transformer_blocks"
EDGE, FULL_DOUBLE, FULL_SINGLE = 8, 19, 38  # of FLUX.1, whose 19 double and 38 single blocks set the scale


def presets(denoiser: nn.Module) -> dict[str, list[str]]:
    """Preset name -> name patterns of linears; no linear is matched by two patterns of one preset.

    modulation, attention and mlp share out the linears of all blocks; blocks is all of them. edges: the blocks that
    read the input and write the output, the first 8 of 19 double and the last 8 of 38 single blocks, in the same
    proportion at other depths, at least one of each. libreflux: all double blocks, the last half of the single blocks
    (rounded up) and the modulation of the others.
    """
    doubles, singles = (len(cast(nn.ModuleList, getattr(denoiser, stack))) for stack in (DOUBLE, SINGLE))
    half, first, last = singles // 2, _edge(doubles, FULL_DOUBLE), _edge(singles, FULL_SINGLE)
    double, single = f"{DOUBLE}.*", f"{SINGLE}.*"
    return {
        "modulation": [f"{double}.norm1.linear", f"{double}.norm1_context.linear", f"{single}.norm.linear"],
        "attention": [
            *(f"{double}.attn.{n}" for n in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj")),
            *(f"{double}.attn.{n}" for n in ("add_v_proj", "to_add_out")),
            *(f"{single}.attn.{n}" for n in ("to_q", "to_k", "to_v")),
        ],
        "mlp": [
            *(f"{double}.{ff}.net.{n}" for ff in ("ff", "ff_context") for n in ("0.proj", "2")),
            f"{single}.proj_mlp",
            f"{single}.proj_out",
        ],
        "blocks": [f"{double}.**", f"{single}.**"],
        "edges": [
            *(f"{DOUBLE}.{i}.**" for i in range(first)),
            *(f"{SINGLE}.{i}.**" for i in range(singles - last, singles)),
        ],
        "libreflux": [
            f"{double}.**",
            *(f"{SINGLE}.{i}.norm.linear" for i in range(half)),
            *(f"{SINGLE}.{i}.**" for i in range(half, singles)),
        ],
    }


def _edge(count: int, full: int) -> int:
    return min(count, max(1, round(count * EDGE / full)))
