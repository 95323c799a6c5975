"""The image codec of a pipeline's folder, loaded when first used, never for a cached sample."""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dedistill.errors import UserError
from dedistill.io.json_files import read_object
from dedistill.models.family import DECODING, Pass
from dedistill.models.pretrained import load_whole, refuse_pointers

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

TILE = 512
"""Side in pixels of what is decoded at a time where memory has run out."""


@dataclass(frozen=True)
class PublishedVae:
    """What is known of a VAE that is not there: pixels per latent of every published one."""

    channels: int
    scale: int = 8

    def check(self) -> None:
        """There is nothing to look at."""

    def unload(self) -> None:
        """There is nothing to free."""

    def in_tiles(self) -> bool:
        return False


class Vae:
    """AutoencoderKL of a pipeline folder; shift and scale come from its config, never from here."""

    def __init__(self, folder: Path):
        self.folder = folder
        config = read_object(folder / "config.json", f"model.path: no VAE in '{folder}'")
        try:
            self.channels, self.scale = int(config["latent_channels"]), 2 ** (len(config["block_out_channels"]) - 1)
        except (ValueError, KeyError, TypeError, ArithmeticError) as e:
            raise UserError(f"model.path: no VAE in '{folder}': its config.json lacks or misstates {e}") from e
        factors = {"scaling_factor": config.get("scaling_factor", 1.0), "shift_factor": config.get("shift_factor") or 0.0}
        for key, value in factors.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not number or (key == "scaling_factor" and value <= 0):
                raise UserError(f"model.path: the VAE's '{folder / 'config.json'}' has {key} = {value!r}: fetch it again")
        refuse_pointers(folder)
        self._loaded = None
        self.tiled = False

    def in_tiles(self) -> bool:
        before, self.tiled = self.tiled, True
        return not before

    def files(self) -> list[Path]:
        """All that decides what it computes."""
        return [self.folder / "config.json", *self.folder.glob("*.safetensors")]

    @property
    def loaded(self) -> bool:
        return self._loaded is not None

    def check(self) -> None:
        """Loads it, which takes a second, and frees it."""
        if not self.loaded:
            self.load("cpu")
            self.unload()

    def load(self, device: torch.device | str) -> None:
        from diffusers import AutoencoderKL

        # float32: bf16 costs visible detail here, and images are encoded once
        vae = load_whole(AutoencoderKL, self.folder, "model.path: the VAE", torch_dtype=torch.float32)
        self._loaded = vae.to(device).eval().requires_grad_(False)

    def unload(self) -> None:
        self._loaded = None

    @torch.no_grad()
    def encode(self, pixels: Tensor, noise: Tensor, device: torch.device | str) -> Tensor:
        """Latents [B, C, H/8, W/8]: mean + std * noise of the posterior, then (z - shift) * scale. A sample, not the mode."""
        vae = self._open(device, tiled=False)
        posterior = vae.encode(pixels.to(device, torch.float32)).latent_dist
        latents = posterior.mean + posterior.std * noise.to(device)
        return (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor

    def decode(self, latents: Tensor, device: torch.device | str) -> Tensor:
        """Pixels [B, 3, H, W], about [-1, 1], one image at a time: the VAE's memory is what runs out first. Where latents have
        gradients, each image is decoded again going back."""
        vae = self._open(device, tiled=self.tiled)
        z = latents.to(device, torch.float32) / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        decoded = partial(vae.decode, return_dict=False)
        if latents.requires_grad and torch.is_grad_enabled():
            decoded = partial(checkpoint, decoded, use_reentrant=False)
        return torch.cat([decoded(row[None])[0] for row in z])

    def _open(self, device: torch.device | str, *, tiled: bool) -> "AutoencoderKL":
        if not self.loaded:
            self.load(device)
        vae: AutoencoderKL = self._loaded
        _cut(vae, self.scale, tiled=tiled)
        return vae


def _cut(vae: "AutoencoderKL", scale: int, *, tiled: bool) -> None:
    """scale: pixels of a latent's side."""
    vae.use_tiling = tiled
    # by itself it would take tiles of the size that it was trained on, which are whole images
    vae.tile_sample_min_size, vae.tile_latent_min_size = TILE, TILE // scale


# --- at full size, as shapes alone -----------------------------------------------------------------------------------


def published_sizes(channels: int) -> dict[str, Any]:
    """config.json of the published VAEs of 4 and of 16 channels."""
    quant = channels == 4
    return {
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        **{"layers_per_block": 2, "latent_channels": channels, "use_quant_conv": quant, "use_post_quant_conv": quant},
    }


def vae_passes(folder: Path, height: int, width: int, channels: int) -> dict[str, Pass]:
    """An image of so many pixels through a VAE on the device that is the default now. folder: where its config is; where it is
    not, it is the published one of ``channels``."""
    from diffusers import AutoencoderKL

    file = folder / "config.json"
    vae = AutoencoderKL.from_config(read_object(file, "model.path") if file.exists() else published_sizes(channels)).eval()
    scale, channels = 2 ** (len(vae.config.block_out_channels) - 1), vae.config.latent_channels

    def encoded() -> object:
        return vae.encode(torch.zeros(1, 3, height, width)).latent_dist.mean

    def decoded() -> object:
        return vae.decode(torch.zeros(1, channels, height // scale, width // scale), return_dict=False)[0]

    def in_tiles() -> object:
        _cut(vae, scale, tiled=True)
        return decoded()

    return {"encoding images": Pass([vae], encoded), DECODING: Pass([vae], decoded, in_tiles)}
