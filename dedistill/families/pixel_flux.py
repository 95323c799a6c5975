"""FLUX in pixel space: diffusers' FluxTransformer2DModel on small pictures, with a frozen word-level text encoder."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from dedistill.errors import UserError
from dedistill.families import flux_layers
from dedistill.families.family import Components, Text
from dedistill.families.words import WordEncoder
from dedistill.flow.timesteps import dynamic_shift


class PixelFlux:
    name = "pixel_flux"

    def load(self, spec: Any, *, seed: int) -> Components:
        """``spec`` is a recipe's [model] table. Raises UserError when the folder is not a model of this family."""
        if spec.path is not None:
            return self._from_folder(Path(spec.path), spec.mask)
        return self.build(spec.new, mask=spec.mask, seed=seed)

    def build(self, new: Any, *, mask: str = "bool", seed: int = 0) -> Components:
        """A network with random weights that depend on ``seed`` alone; the global generator is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = FluxTransformer2DModel(
                patch_size=1,
                in_channels=new.channels * new.patch**2,
                num_layers=new.layers,
                num_single_layers=new.single_layers,
                attention_head_dim=new.head_dim,
                num_attention_heads=new.heads,
                joint_attention_dim=new.text_dim,
                pooled_projection_dim=new.pooled_dim,
                guidance_embeds=False,
                axes_dims_rope=tuple(new.rope_axes),
            )
        picture = (new.channels, new.height, new.width)
        return Components(net, WordEncoder(new.text_dim, new.pooled_dim), picture, _tokens(picture, net), mask)

    def tiny(self, seed: int) -> Components:
        picture = {"channels": 1, "height": 8, "width": 16, "patch": 4}
        sizes = {"layers": 1, "single_layers": 1, "heads": 2, "head_dim": 16, "rope_axes": [4, 6, 6]}
        return self.build(SimpleNamespace(**picture, **sizes, text_dim=16, pooled_dim=16), seed=seed)

    def save(self, parts: Components, folder: Path) -> None:
        parts.net.save_pretrained(folder / "transformer")
        facts = {"family": self.name, "picture": parts.picture, "mask": parts.mask, "text": parts.text.config()}
        (folder / "dedistill.json").write_text(json.dumps(facts, indent=1) + "\n")

    def _from_folder(self, folder: Path, mask: str) -> Components:
        try:
            facts = json.loads((folder / "dedistill.json").read_text())
            family, picture, text = facts["family"], tuple(facts["picture"]), WordEncoder(**facts["text"])
            net = FluxTransformer2DModel.from_pretrained(folder / "transformer", local_files_only=True, use_safetensors=True)
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise UserError(f"model.path: no {self.name} model in '{folder}' (train it first): {e}") from e
        if family != self.name:
            raise UserError(f"model.path: '{folder}' holds a {family} model, not {self.name}")
        return Components(net, text, picture, _tokens(picture, net), mask)

    def encode_text(self, parts: Components, captions: list[str], length: int) -> Text:
        return parts.text(captions, length)

    def velocity(self, parts: Components, net: nn.Module, noisy: Tensor, sigma: Tensor, text: Text) -> Tensor:
        if sigma.dtype not in (torch.float32, torch.float64) or not (sigma.min() >= 0 and sigma.max() <= 1):
            raise ValueError("sigma must be float32 in [0, 1]; the network multiplies by 1000 itself")
        channels, height, width = noisy.shape[1:]
        patch = _patch(channels, parts.net)
        if parts.mask == "bool":
            text = text.trimmed()
        with exact_timestep(parts.net.time_text_embed, sigma):
            out = net(
                hidden_states=patchify(noisy, patch),
                encoder_hidden_states=text.embeds,
                pooled_projections=text.pooled,
                timestep=sigma.float(),
                img_ids=_picture_ids(height // patch, width // patch, noisy.device),
                txt_ids=torch.zeros(text.embeds.shape[1], 3, device=noisy.device),
                joint_attention_kwargs=attention_mask(text.mask, height * width // patch**2) if parts.mask == "bool" else None,
                return_dict=False,
            )[0]
        return unpatchify(out, patch, channels, height, width)

    def shift(self, tokens: int) -> float:
        return dynamic_shift(tokens)

    def blocks(self, net: nn.Module) -> list[nn.Module]:
        return [*net.transformer_blocks, *net.single_transformer_blocks]

    def presets(self, net: nn.Module) -> dict[str, list[str]]:
        return flux_layers.presets(net)

    def export_key(self, name: str) -> str:
        return f"transformer.{name}"


@contextmanager
def exact_timestep(embedding: nn.Module, sigma: Tensor) -> Iterator[None]:
    """Let the time embedding see 1000 sigma in float32.

    diffusers casts sigma to the hidden states' dtype before multiplying by 1000: in bf16 the network would be told
    a noise level up to 4 of 1000 away from the one it is shown.
    """
    hook = embedding.register_forward_pre_hook(lambda _, args: (1000 * sigma.float(), *args[1:]))
    try:
        yield
    finally:
        hook.remove()


def patchify(pictures: Tensor, patch: int) -> Tensor:
    """[B, C, H, W] -> [B, H/p * W/p, C p p], token order row by row, channel order (c, row, column) as FLUX packs."""
    b, c, h, w = pictures.shape
    tokens = pictures.reshape(b, c, h // patch, patch, w // patch, patch).permute(0, 2, 4, 1, 3, 5)
    return tokens.reshape(b, (h // patch) * (w // patch), c * patch * patch)


def unpatchify(tokens: Tensor, patch: int, channels: int, height: int, width: int) -> Tensor:
    """The inverse of :func:`patchify`."""
    grid = tokens.reshape(-1, height // patch, width // patch, channels, patch, patch).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(-1, channels, height, width)


def attention_mask(text_mask: Tensor, picture_tokens: int) -> dict[str, Tensor] | None:
    """Boolean key mask [B, 1, 1, T + I], text first; None when no token is padding, which keeps the fast kernels.

    A float mask would be added to the scores instead of hiding anything, so only bool leaves this function.
    """
    if bool(text_mask.all()):
        return None
    picture = torch.ones(len(text_mask), picture_tokens, dtype=torch.bool, device=text_mask.device)
    return {"attention_mask": torch.cat([text_mask, picture], 1)[:, None, None, :]}


def _picture_ids(rows: int, columns: int, device: torch.device) -> Tensor:
    ids = torch.zeros(rows, columns, 3, device=device)
    ids[..., 1] += torch.arange(rows, device=device)[:, None]
    ids[..., 2] += torch.arange(columns, device=device)[None]
    return ids.reshape(-1, 3)


def _patch(channels: int, net: nn.Module) -> int:
    return round((net.config.in_channels / channels) ** 0.5)


def _tokens(picture: tuple[int, int, int], net: nn.Module) -> int:
    return picture[1] * picture[2] // _patch(picture[0], net) ** 2
