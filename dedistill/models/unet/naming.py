"""A U-Net's layers as the original repositories, and with them ComfyUI and kohya's programs, call them.

Nothing is fused: every original layer is one of diffusers', under another name. Sources: CompVis/latent-diffusion
(ldm/modules/diffusionmodules/openaimodel.py), Stability-AI/generative-models; diffusers' single-file loader is the inverse.
"""

import re
from dataclasses import dataclass

from dedistill.adapters.naming import LayerNames
from dedistill.errors import UserError
from dedistill.models.network_files import PREFIX

_TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    **{"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3"},
    **{"time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"},
}


@dataclass(frozen=True)
class LdmNames(LayerNames):
    """Of a network with such blocks, whatever its widths and depths of transformers.

    up_with_attention: of each of its up blocks, whether it has attention; kohya_original: whether kohya's programs go by the
    original names in files of adapters, or by diffusers'.
    """

    up_with_attention: tuple[bool, ...]
    kohya_original: bool
    layers: int = 2
    """Residual blocks of a down block; an up block has one more."""

    def original(self, module: str) -> str:
        """The original name of diffusers' ``module``. Raises UserError for one that such a network does not have."""
        if module in _TOP:
            return _TOP[module]
        if found := re.fullmatch(r"(down_blocks|up_blocks)\.(\d+)\.(\w+)\.(\d+)\.(.+)", module):
            block, index = int(found[2]), int(found[4])
            if name := self._in_block(found[1], block, found[3], index, found[5]):
                return name
        if found := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", module):
            place = 2 * int(found[2]) + (found[1] == "attentions")
            return f"middle_block.{place}.{_inner(found[1], found[3], module)}"
        raise _unknown(module)

    def _in_block(self, side: str, block: int, kind: str, index: int, rest: str) -> str:
        per = self.layers + 1
        if side == "down_blocks":
            first = 1 + per * block
            if kind == "downsamplers":
                return f"input_blocks.{first + self.layers}.0.op"
            stem = f"input_blocks.{first + index}"
        else:
            first = per * block
            if kind == "upsamplers":
                return f"output_blocks.{first + self.layers}.{1 + self.up_with_attention[block]}.conv"
            stem = f"output_blocks.{first + index}"
        if kind not in ("resnets", "attentions"):
            return ""
        return f"{stem}.{int(kind == 'attentions')}.{_inner(kind, rest, f'{side}.{block}.{kind}.{index}.{rest}')}"

    def diffusers(self, original: str) -> str:
        """The inverse of :meth:`original`."""
        if original in _TOP_BACK:
            return _TOP_BACK[original]
        side, number, rest = original.split(".", 2)
        if side == "middle_block":
            index, attention = divmod(int(number), 2)
            return f"mid_block.{_kind(attention)}.{index}.{_outer(attention, rest)}"
        place, _, rest = rest.partition(".")
        block, index = divmod(int(number) - (side == "input_blocks"), self.layers + 1)
        if side == "input_blocks":
            if index == self.layers:
                return f"down_blocks.{block}.downsamplers.0.conv"
            return f"down_blocks.{block}.{_kind(int(place))}.{index}.{_outer(int(place), rest)}"
        if rest == "conv":
            return f"up_blocks.{block}.upsamplers.0.conv"
        return f"up_blocks.{block}.{_kind(int(place))}.{index}.{_outer(int(place), rest)}"

    # --- LayerNames ------------------------------------------------------------------------------------------------------

    KOHYA_MODULE = "networks.lora"
    KOHYA_LEAVES_OUT = r"^(time_embed|label_emb|out|input_blocks\.0)\."
    DIFFUSERS_CONVERTS = True

    def original_parts(self, module: str) -> tuple[str, tuple[str, ...]]:
        return self.original(module), (module,)

    def original_tensor(self, name: str) -> tuple[str, tuple[str, ...]]:
        original, parts = super().original_tensor(name)
        return f"{PREFIX}{original}", parts

    def kohya_name(self, original: str) -> str:
        return "lora_unet_" + (original if self.kohya_original else self.diffusers(original)).replace(".", "_")


_TOP_BACK = {original: own for own, original in _TOP.items()}
_RESNET_BACK = {original: own for own, original in _RESNET.items()}


def _kind(attention: int) -> str:
    return "attentions" if attention else "resnets"


def _outer(attention: int, rest: str) -> str:
    return rest if attention else _RESNET_BACK[rest]


def _inner(kind: str, rest: str, module: str) -> str:
    if kind == "attentions":
        return rest
    if rest not in _RESNET:
        raise _unknown(module)
    return _RESNET[rest]


def _unknown(module: str) -> UserError:
    return UserError(f"'{module}' is not a layer of this U-Net: it has no name in the original files")
