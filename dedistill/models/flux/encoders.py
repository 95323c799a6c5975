"""FLUX's text encoders: T5 and CLIP."""

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from dedistill.errors import UserError
from dedistill.io.json_files import read_object
from dedistill.models.conditioning import Conditioning, Widths, collate
from dedistill.models.prompts import CHUNK, CLIP_FILES, CLIP_L, CLIP_TOKENS, T5_FILES, T5_XXL, Encoder, PromptEncoders

ENCODERS = {
    "clip": Encoder("text_encoder", "tokenizer", "CLIPTextModel", CLIP_FILES, CLIP_L),
    "t5": Encoder("text_encoder_2", "tokenizer_2", "T5EncoderModel", T5_FILES, T5_XXL, padded=True, tokens=None),
}


class FluxText(PromptEncoders):
    """Captions -> conditioning from the folder of a pipeline.

    t5_mask: T5 does not look at padding either, so that a caption means the same at any length; False is how diffusers
    and LibreFLUX call it: there the padding leaks into the real tokens, so the length is part of the result.
    """

    def __init__(self, folder: Path, t5_mask: bool):
        super().__init__(folder, ENCODERS)
        self.t5_mask = t5_mask

    @property
    def widths(self) -> Widths:
        """Of T5's embeddings and of CLIP's pooled vector, as the encoders' files say; loads nothing."""
        t5, clip = (read_object(self.folder / f / "config.json", "model.path") for f in ("text_encoder_2", "text_encoder"))
        try:
            return Widths((int(t5["d_model"]),), {"pooled": int(clip["hidden_size"])})
        except (ValueError, KeyError, TypeError, ArithmeticError) as e:
            raise UserError(f"model.path: the text encoders in '{self.folder}' have no usable config.json: {e!r}") from e

    def tokens(self, captions: list[str]) -> list[int]:
        """T5 tokens of each caption, end token included, however long."""
        return self.lengths("t5", captions)

    @torch.no_grad()
    def __call__(self, captions: list[str], length: int, device: torch.device | str = "cpu") -> Conditioning:
        """embeds [B, length, D], mask [B, length], pooled [B, P] on ``device``; longer captions are cut, keeping their end."""
        (clip_tokenizer, clip), (t5_tokenizer, t5) = self.on(device).values()
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
