"""FLUX's text encoders: T5 for the tokens, CLIP for the pooled vector. Loaded when first used, never for a cached caption."""

from pathlib import Path

import torch

from dedistill.errors import UserError
from dedistill.text import Text

CLIP_TOKENS = 77
CHUNK = 16


class FluxText:
    """Captions -> :class:`Text` from the folder of a pipeline.

    t5_mask: T5 does not look at padding either, so that a caption means the same at any length; False is how diffusers
    and LibreFLUX call it: there the padding leaks into the real tokens, so the length is part of the result.
    """

    def __init__(self, folder: Path, t5_mask: bool):
        self.folder, self.t5_mask = folder, t5_mask
        for name in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
            if not (folder / name).is_dir():
                raise UserError(f"model.path: '{folder}' has no folder '{name}', which FLUX's captions need")
        self._loaded = None

    def files(self) -> list[Path]:
        """All that decides what a caption becomes."""
        parts = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
        return [file for part in parts for file in (self.folder / part).iterdir() if file.is_file()]

    @property
    def loaded(self) -> bool:
        return self._loaded is not None

    def load(self, device: torch.device | str) -> None:
        from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel

        try:
            folders = [self.folder / name for name in ("tokenizer", "tokenizer_2")]
            tokenizers = [AutoTokenizer.from_pretrained(folder, local_files_only=True) for folder in folders]
            kind = {"local_files_only": True, "use_safetensors": True, "dtype": "auto"}
            clip = CLIPTextModel.from_pretrained(self.folder / "text_encoder", **kind)
            t5 = T5EncoderModel.from_pretrained(self.folder / "text_encoder_2", **kind)
        except (OSError, ValueError) as e:
            raise UserError(f"model.path: the text encoders in '{self.folder}' cannot be loaded: {e}") from e
        self._loaded = (*tokenizers, clip.to(device).eval(), t5.to(device).eval())

    def unload(self) -> None:
        """Free the memory of both encoders."""
        self._loaded = None

    def tokens(self, captions: list[str]) -> list[int]:
        """T5 tokens of each caption, end token included, however long."""
        from transformers import AutoTokenizer

        tokenizer = self._loaded[1] if self._loaded else AutoTokenizer.from_pretrained(self.folder / "tokenizer_2")
        return [len(ids) for ids in tokenizer(captions)["input_ids"]]

    @torch.no_grad()
    def __call__(self, captions: list[str], length: int, device: torch.device | str = "cpu") -> Text:
        """embeds [B, length, D], mask [B, length], pooled [B, P] on ``device``; longer captions are cut, keeping their end."""
        if not self.loaded:
            self.load(device)
        chunks = [self._encode(captions[i : i + CHUNK], length) for i in range(0, len(captions), CHUNK)]
        return Text(*(torch.cat([getattr(c, name) for c in chunks]) for name in ("embeds", "mask", "pooled")))

    def _encode(self, captions: list[str], length: int) -> Text:
        clip_tokenizer, t5_tokenizer, clip, t5 = self._loaded
        kind = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        ids = clip_tokenizer(captions, max_length=CLIP_TOKENS, **kind).input_ids
        pooled = clip(ids.to(clip.device)).pooler_output
        tokens = t5_tokenizer(captions, max_length=length, **kind)
        mask = tokens.attention_mask.to(t5.device)
        embeds = t5(tokens.input_ids.to(t5.device), attention_mask=mask if self.t5_mask else None).last_hidden_state
        return Text(embeds, mask.bool(), pooled)
