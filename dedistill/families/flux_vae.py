"""FLUX's picture codec: pixels in [-1, 1] to standardised latents and back. Loaded when first used."""

import json
from pathlib import Path

import torch
from torch import Tensor

from dedistill.errors import UserError
from dedistill.pretrained import load_whole


class FluxVae:
    """AutoencoderKL of a pipeline folder; shift and scale come from its config, never from here."""

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            config = json.loads((folder / "config.json").read_text())
            self.channels, self.scale = int(config["latent_channels"]), 2 ** (len(config["block_out_channels"]) - 1)
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise UserError(f"model.path: no VAE in '{folder}': {e}") from e
        self._loaded = None

    def files(self) -> list[Path]:
        """All that decides what it computes."""
        return [self.folder / "config.json", *self.folder.glob("*.safetensors")]

    @property
    def loaded(self) -> bool:
        return self._loaded is not None

    def load(self, device: torch.device | str) -> None:
        from diffusers import AutoencoderKL

        # float32: bf16 costs visible detail here, and pictures are encoded once
        vae = load_whole(AutoencoderKL, self.folder, "model.path: the VAE", torch_dtype=torch.float32)
        self._loaded = vae.to(device).eval()

    def unload(self) -> None:
        self._loaded = None

    @torch.no_grad()
    def encode(self, pixels: Tensor, noise: Tensor, device: torch.device | str) -> Tensor:
        """Latents [B, C, H/8, W/8]: mean + std * noise of the posterior, then (z - shift) * scale. A sample, not the mode."""
        vae = self._open(device)
        posterior = vae.encode(pixels.to(device, torch.float32)).latent_dist
        latents = posterior.mean + posterior.std * noise.to(device)
        return (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor, device: torch.device | str) -> Tensor:
        """Pixels [B, 3, H, W], about [-1, 1], one picture at a time: the VAE's memory is what runs out first."""
        vae = self._open(device)
        z = latents.to(device, torch.float32) / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        return torch.cat([vae.decode(row[None], return_dict=False)[0] for row in z])

    def _open(self, device: torch.device | str):
        if not self.loaded:
            self.load(device)
        return self._loaded
