"""SD3.5's layers by name: diffusers', Stability AI's own, and named sets of them.

Stability AI's files fuse q, k and v of each attention. Two modulations have their halves the other way round there, (shift,
scale): that of the output, and that of the text in the last block, which has no more than these two. Everything else is a
change of names. Sources: github.com/Stability-AI/sd3.5 (mmditx.py), diffusers' single-file loader, which is the inverse.
"""

import re
from collections.abc import Collection
from typing import ClassVar, cast

from torch import nn

from dedistill.adapters.naming import TableNames, Tables

# original module -> diffusers modules, in the order of its rows
_TOP: dict[str, tuple[str, ...]] = {
    "x_embedder.proj": ("pos_embed.proj",),
    "t_embedder.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("time_text_embed.timestep_embedder.linear_2",),
    "y_embedder.mlp.0": ("time_text_embed.text_embedder.linear_1",),
    "y_embedder.mlp.2": ("time_text_embed.text_embedder.linear_2",),
    "context_embedder": ("context_embedder",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
_CONTEXT_MODULATION = "context_block.adaLN_modulation.1"
_BLOCK: dict[str, tuple[str, ...]] = {
    "x_block.adaLN_modulation.1": ("norm1.linear",),
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn.ln_q": ("attn.norm_q",),
    "x_block.attn.ln_k": ("attn.norm_k",),
    "x_block.attn.proj": ("attn.to_out.0",),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block.attn2.ln_q": ("attn2.norm_q",),
    "x_block.attn2.ln_k": ("attn2.norm_k",),
    "x_block.attn2.proj": ("attn2.to_out.0",),
    "x_block.mlp.fc1": ("ff.net.0.proj",),
    "x_block.mlp.fc2": ("ff.net.2",),
    _CONTEXT_MODULATION: ("norm1_context.linear",),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "context_block.attn.ln_q": ("attn.norm_added_q",),
    "context_block.attn.ln_k": ("attn.norm_added_k",),
    "context_block.attn.proj": ("attn.to_add_out",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",),
    "context_block.mlp.fc2": ("ff_context.net.2",),
}
_POSITIONS = {"pos_embed.pos_embed": "pos_embed"}
"""A tensor that is no parameter of a layer."""


class Sd3Names(TableNames):
    TABLES: ClassVar[Tables] = {"": ("", _TOP), "transformer_blocks": ("joint_blocks", _BLOCK)}
    UNKNOWN = "SD3.5: it has no name in Stability AI's files"
    KOHYA_MODULE = "networks.lora_sd3"
    KOHYA_LEAVES_OUT = ""
    DIFFUSERS_CONVERTS = False

    def original_tensor(self, name: str) -> tuple[str, tuple[str, ...]]:
        return (_POSITIONS[name], (name,)) if name in _POSITIONS else super().original_tensor(name)

    def is_swapped(self, original: str, network: Collection[str]) -> bool:
        """Whether the halves of this original module's rows stand the other way round than in diffusers."""
        if original == "final_layer.adaLN_modulation.1":
            return True
        block = re.fullmatch(rf"joint_blocks\.(\d+)\.{re.escape(_CONTEXT_MODULATION)}", original)
        if not block:
            return False
        after = f"transformer_blocks.{block[1]}.attn.to_add_out"  # of all blocks but the last
        return after not in network and f"{after}.weight" not in network


NAMES = Sd3Names()


# --- named sets of layers --------------------------------------------------------------------------------------------


def presets(denoiser: nn.Module) -> dict[str, list[str]]:
    """Preset name -> name patterns of linears; no linear is matched by two patterns of one preset.

    modulation, attention and mlp share out the linears of all blocks; blocks is all of them. One is in none: the text's queries
    of the last block, whose answers nothing reads, so that they cannot learn.
    """
    blocks = cast(nn.ModuleList, denoiser.transformer_blocks)
    found = (name for block in blocks for name, module in block.named_modules() if isinstance(module, nn.Linear))
    patterns: dict[str, list[str]] = {"modulation": [], "attention": [], "mlp": []}
    for name in dict.fromkeys(found):
        kind = "modulation" if name.startswith("norm1") else "mlp" if name.startswith("ff") else "attention"
        places = [str(i) for i in range(len(blocks) - 1)] if name == "attn.add_q_proj" else ["*"]
        patterns[kind] += [f"transformer_blocks.{place}.{name}" for place in places]
    return patterns | {"blocks": [pattern for kind in patterns.values() for pattern in kind]}
