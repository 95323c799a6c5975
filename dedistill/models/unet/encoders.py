"""What a U-Net is told of a caption: the hidden states of one CLIP, or of two side by side with the vector of the second."""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dedistill.errors import UserError
from dedistill.io.json_files import read_object
from dedistill.models.conditioning import Conditioning, Widths, collate
from dedistill.models.prompts import CHUNK, CLIP_FILES, CLIP_G, CLIP_L, Encoder, PromptEncoders

Null = Literal["empty", "zeros"]
"""What the empty caption is: what the encoders make of it, or zeros."""
ONE = {"clip": Encoder("text_encoder", "tokenizer", "CLIPTextModel", CLIP_FILES, CLIP_L)}
TWO = ONE | {"clip_2": Encoder("text_encoder_2", "tokenizer_2", "CLIPTextModelWithProjection", CLIP_FILES, CLIP_G)}


class ClipText(PromptEncoders):
    """Captions -> conditioning of :data:`CLIP_TOKENS` tokens, padding included, which takes part.

    Of one encoder the last hidden state, after its norm; of two the last but one of both side by side, and the second's
    projected vector as "pooled". As diffusers' pipelines of StableDiffusion and StableDiffusionXL call them.
    """

    def __init__(self, folder: Path, *, encoders: int, null: Null):
        super().__init__(folder, ONE if encoders == 1 else TWO)
        self.null = null

    @property
    def widths(self) -> Widths:
        """As the encoders' files say; loads nothing."""
        configs = [read_object(self.folder / e.folder / "config.json", "model.path") for e in self.encoders.values()]
        try:
            width = sum(int(config["hidden_size"]) for config in configs)
            vectors = {"pooled": int(configs[1]["projection_dim"])} if len(configs) > 1 else {}
            return Widths((width,), vectors)
        except (ValueError, KeyError, TypeError, ArithmeticError) as e:
            raise UserError(f"model.path: the text encoders in '{self.folder}' have no usable config.json: {e!r}") from e

    def tokens(self, captions: list[str]) -> list[int]:
        return self.lengths("clip", captions)

    @torch.no_grad()
    def __call__(self, captions: list[str], length: int, device: torch.device | str = "cpu") -> Conditioning:
        """embeds [B, length, D], mask [B, length], on ``device``; longer captions are cut, keeping their end."""
        chunks = [captions[i : i + CHUNK] for i in range(0, len(captions), CHUNK)]
        return collate([self._encoded(chunk, length, device) for chunk in chunks])

    def _encoded(self, captions: list[str], length: int, device: torch.device | str) -> Conditioning:
        states: list[Tensor] = []
        vectors: dict[str, Tensor] = {}
        mask = torch.empty(0)
        for tokenizer, network in self.on(device).values():
            on = next(network.parameters()).device
            # no mask: CLIP sees nothing of what stands to the right
            tokens = tokenizer(captions, max_length=length, padding="max_length", truncation=True, return_tensors="pt").to(on)
            mask = tokens.attention_mask.bool() if not states else mask
            out: Any = network(tokens.input_ids, output_hidden_states=True)
            states.append(out.last_hidden_state if len(self.encoders) == 1 else out.hidden_states[-2])
            vectors = {"pooled": out.text_embeds} if states[1:] else {}
        text = Conditioning.of(torch.cat(states, -1), mask, **vectors)
        if self.null == "empty":
            return text
        return text.each(lambda t: t if t.dtype == torch.bool else t * _with_caption(captions, t))


def _with_caption(captions: list[str], like: Tensor) -> Tensor:
    """0 for the empty captions, 1 for others, shaped so that it multiplies ``like``."""
    with_caption = torch.tensor([caption != "" for caption in captions], dtype=like.dtype, device=like.device)
    return with_caption.reshape(-1, *[1] * (like.ndim - 1))
