"""FLUX's encoders: T5 and CLIP for captions, a VAE for images. Loaded when first used, never for a cached sample."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dedistill.errors import UserError
from dedistill.io.json_files import read_object
from dedistill.models.conditioning import Conditioning, Widths, collate
from dedistill.models.pretrained import check_vocabulary, load_tokenizer, load_whole

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

# --- FLUX's text encoders --------------------------------------------------------------------------------------------


CLIP_TOKENS = 77
CHUNK = 16
TILE = 512
"""Side in pixels of what is decoded at a time where memory has run out."""
VOCABULARIES = {
    "tokenizer": (("tokenizer.json",), ("vocab.json", "merges.txt")),
    "tokenizer_2": (("tokenizer.json",), ("spiece.model",)),
}
"""Files by which either tokenizer knows its words; without any, transformers makes one that knows none."""


_Loaded = tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase, nn.Module, nn.Module]
"""CLIP's tokenizer, T5's, CLIP, T5."""


class FluxText:
    """Captions -> conditioning from the folder of a pipeline.

    t5_mask: T5 does not look at padding either, so that a caption means the same at any length; False is how diffusers
    and LibreFLUX call it: there the padding leaks into the real tokens, so the length is part of the result.
    """

    def __init__(self, folder: Path, t5_mask: bool):
        self.folder, self.t5_mask = folder, t5_mask
        for name in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
            if not (folder / name).is_dir():
                raise UserError(f"model.path: '{folder}' has no folder '{name}', which FLUX's captions need")
        for name, vocabularies in VOCABULARIES.items():
            if not any(all((folder / name / file).is_file() for file in files) for files in vocabularies):
                needed = ", or ".join(" and ".join(files) for files in vocabularies)
                raise UserError(f"model.path: '{folder / name}' has no vocabulary; it needs {needed}. Fetch it with all files")
        self._loaded: _Loaded | None = None

    def files(self) -> list[Path]:
        """All that decides what a caption becomes."""
        parts = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
        return [file for part in parts for file in (self.folder / part).iterdir() if file.is_file()]

    @property
    def widths(self) -> Widths:
        """Of T5's embeddings and of CLIP's pooled vector, as the encoders' files say; loads nothing."""
        t5, clip = (read_object(self.folder / f / "config.json", "model.path") for f in ("text_encoder_2", "text_encoder"))
        try:
            return Widths((int(t5["d_model"]),), {"pooled": int(clip["hidden_size"])})
        except (ValueError, KeyError, TypeError, ArithmeticError) as e:
            raise UserError(f"model.path: the text encoders in '{self.folder}' have no usable config.json: {e!r}") from e

    @property
    def loaded(self) -> bool:
        return self._loaded is not None

    def load(self, device: torch.device | str) -> None:
        from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel
        from transformers.utils import logging

        logging.disable_progress_bar()
        source = f"model.path: the text encoders in '{self.folder}'"
        folders = [self.folder / name for name in VOCABULARIES]
        tokenizers = [load_tokenizer(AutoTokenizer, folder, source) for folder in folders]
        clip = load_whole(CLIPTextModel, self.folder / "text_encoder", source, dtype="auto")
        t5 = load_whole(T5EncoderModel, self.folder / "text_encoder_2", source, dtype="auto")
        check_vocabulary(tokenizers[0], clip.config.vocab_size, folders[0], source)
        check_vocabulary(tokenizers[1], t5.config.vocab_size, folders[1], source, padded=True)
        self._loaded = (tokenizers[0], tokenizers[1], clip.to(device).eval(), t5.to(device).eval())

    def unload(self) -> None:
        """Free the memory of both encoders."""
        self._loaded = None

    def tokens(self, captions: list[str]) -> list[int]:
        """T5 tokens of each caption, end token included, however long."""
        from transformers import AutoTokenizer

        own = self._loaded[1] if self._loaded else load_tokenizer(AutoTokenizer, self.folder / "tokenizer_2", "model.path")
        return [len(ids) for ids in own(captions)["input_ids"]]

    @torch.no_grad()
    def __call__(self, captions: list[str], length: int, device: torch.device | str = "cpu") -> Conditioning:
        """embeds [B, length, D], mask [B, length], pooled [B, P] on ``device``; longer captions are cut, keeping their end."""
        if self._loaded is None:
            self.load(device)
        clip_tokenizer, t5_tokenizer, clip, t5 = cast(_Loaded, self._loaded)
        chunks = [captions[i : i + CHUNK] for i in range(0, len(captions), CHUNK)]
        on = next(clip.parameters()).device
        texts = [encode(clip_tokenizer, t5_tokenizer, clip, t5, c, length, t5_mask=self.t5_mask, device=on) for c in chunks]
        return collate(texts)


def encode(
    clip_tokenizer: PreTrainedTokenizerBase,
    t5_tokenizer: PreTrainedTokenizerBase,
    clip: nn.Module,
    t5: nn.Module,
    captions: list[str],
    length: int,
    *,
    t5_mask: bool,
    device: torch.device | str,
) -> Conditioning:
    """Captions in T5's hidden states, padded or cut to ``length``, and CLIP's pooled vectors. device: where both run."""
    kind = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    pooled = clip(clip_tokenizer(captions, max_length=CLIP_TOKENS, **kind).input_ids.to(device)).pooler_output
    tokens = t5_tokenizer(captions, max_length=length, **kind).to(device)
    mask = tokens.attention_mask
    embeds = t5(tokens.input_ids, attention_mask=mask if t5_mask else None).last_hidden_state
    return Conditioning.of(embeds, mask.bool(), pooled=pooled)


# --- FLUX's image codec --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PublishedVae:
    """What is known of a VAE that is not there: pixels per latent of every published one."""

    channels: int
    scale: int = 8

    def unload(self) -> None:
        """There is nothing to free."""

    def in_tiles(self) -> bool:
        return False


class FluxVae:
    """AutoencoderKL of a pipeline folder; shift and scale come from its config, never from here."""

    def __init__(self, folder: Path):
        self.folder = folder
        config = read_object(folder / "config.json", f"model.path: no VAE in '{folder}'")
        try:
            self.channels, self.scale = int(config["latent_channels"]), 2 ** (len(config["block_out_channels"]) - 1)
        except (ValueError, KeyError, TypeError, ArithmeticError) as e:
            raise UserError(f"model.path: no VAE in '{folder}': its config.json lacks or misstates {e}") from e
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

    def load(self, device: torch.device | str) -> None:
        from diffusers import AutoencoderKL

        # float32: bf16 costs visible detail here, and images are encoded once
        vae = load_whole(AutoencoderKL, self.folder, "model.path: the VAE", torch_dtype=torch.float32)
        self._loaded = vae.to(device).eval()

    def unload(self) -> None:
        self._loaded = None

    @torch.no_grad()
    def encode(self, pixels: Tensor, noise: Tensor, device: torch.device | str) -> Tensor:
        """Latents [B, C, H/8, W/8]: mean + std * noise of the posterior, then (z - shift) * scale. A sample, not the mode."""
        vae = self._open(device, tiled=False)
        posterior = vae.encode(pixels.to(device, torch.float32)).latent_dist
        latents = posterior.mean + posterior.std * noise.to(device)
        return (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor, device: torch.device | str) -> Tensor:
        """Pixels [B, 3, H, W], about [-1, 1], one image at a time: the VAE's memory is what runs out first."""
        vae = self._open(device, tiled=self.tiled)
        z = latents.to(device, torch.float32) / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        return torch.cat([vae.decode(row[None], return_dict=False)[0] for row in z])

    def _open(self, device: torch.device | str, *, tiled: bool) -> "AutoencoderKL":
        if not self.loaded:
            self.load(device)
        vae: AutoencoderKL = self._loaded
        vae.use_tiling = tiled
        # by itself it would take tiles of the size that it was trained on, which are whole images
        vae.tile_sample_min_size, vae.tile_latent_min_size = TILE, TILE // self.scale
        return vae
