"""SD3's three text encoders: CLIP ViT-L, OpenCLIP ViT-bigG and T5, of which any may be absent."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dedistill.errors import UserError
from dedistill.io.json_files import read_object
from dedistill.models.conditioning import Conditioning, Tokens, Widths, collate
from dedistill.models.prompts import (
    CHUNK,
    CLIP_FILES,
    CLIP_G,
    CLIP_L,
    CLIP_TOKENS,
    T5_FILES,
    T5_XXL,
    Encoder,
    Loaded,
    PromptEncoders,
)

CLIPS = ("clip_l", "clip_g")
ENCODERS = {
    "clip_l": Encoder("text_encoder", "tokenizer", "CLIPTextModelWithProjection", CLIP_FILES, CLIP_L),
    "clip_g": Encoder("text_encoder_2", "tokenizer_2", "CLIPTextModelWithProjection", CLIP_FILES, CLIP_G),
    "t5": Encoder("text_encoder_3", "tokenizer_3", "T5EncoderModel", T5_FILES, T5_XXL, padded=True, tokens=None),
}


class Sd3Text(PromptEncoders):
    """Captions -> two sequences, T5's hidden states and the last but one of both CLIPs side by side, and the vectors of both
    CLIPs end to end.

    Padding takes part everywhere, also in T5, as the models were trained. What stands for an encoder that is absent is zeros,
    as in diffusers' pipeline and as encoders were dropped in training; a sequence of which there is nothing but zeros has no
    tokens here. vector: width of the network's vector of a caption. Raises UserError for a folder without any encoder.
    """

    def __init__(self, folder: Path, vector: int):
        super().__init__(folder, _present(folder))
        if not self.encoders:
            raise UserError(f"model.path: '{folder}' has no text encoder: at least one of three is needed")
        self.vector = vector

    def absent(self) -> list[str]:
        """Folders of those that are not there."""
        return [encoder.folder for name, encoder in ENCODERS.items() if name not in self.encoders]

    def _size(self, name: str, key: str) -> int:
        """A number in an encoder's config.json; of an absent CLIP what the other one leaves of ``vector``."""
        if name in self.encoders:
            place = self.folder / self.encoders[name].folder / "config.json"
            size = read_object(place, "model.path").get(key)
            if not isinstance(size, int):
                raise UserError(f"model.path: '{place}' has no usable '{key}': {size!r}")
            return size
        others = (self._size(other, "projection_dim") for other in CLIPS if other != name and other in self.encoders)
        return self.vector - sum(others) if len(self.encoders.keys() & set(CLIPS)) == 1 else self.vector // 2

    @property
    def widths(self) -> Widths:
        """As the encoders' files say; loads nothing."""
        clips, t5 = any(name in self.encoders for name in CLIPS), "t5" in self.encoders
        widths = self._size("t5", "d_model") if t5 else 0, sum(self._size(name, "hidden_size") for name in CLIPS)
        vector = sum(self._size(name, "projection_dim") for name in CLIPS)
        return Widths(widths, {"pooled": vector}, (None if t5 else 0, CLIP_TOKENS if clips else 0))

    def tokens(self, captions: list[str]) -> list[int]:
        """T5 tokens of each caption, end token included, however long; without T5, CLIP's."""
        return self.lengths("t5" if "t5" in self.encoders else next(iter(self.encoders)), captions)

    @torch.no_grad()
    def __call__(self, captions: list[str], length: int, device: torch.device | str = "cpu") -> Conditioning:
        """T5's sequence of ``length`` tokens, CLIP's of 77, "pooled" [B, P]; longer captions are cut, keeping their ends."""
        loaded = self.on(device)
        chunks = [captions[i : i + CHUNK] for i in range(0, len(captions), CHUNK)]
        return collate([self._encoded(loaded, chunk, length) for chunk in chunks])

    def _encoded(self, loaded: dict[str, Loaded], captions: list[str], length: int) -> Conditioning:
        on = next(next(iter(loaded.values()))[1].parameters())
        kind = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        t5 = _nothing(len(captions), self.widths.sequences[0], on)
        if "t5" in loaded:
            tokenizer, network = loaded["t5"]
            ids = tokenizer(captions, max_length=length, **kind).to(on.device)
            t5 = Tokens(network(ids.input_ids).last_hidden_state, ids.attention_mask.bool())
        hidden: list[Tensor] = []
        pooled: list[Tensor] = []
        clip = _nothing(len(captions), self.widths.sequences[1], on)
        for name in CLIPS:
            if name in loaded:
                tokenizer, network = loaded[name]
                ids = tokenizer(captions, max_length=CLIP_TOKENS, **kind).to(on.device)
                out = network(ids.input_ids, output_hidden_states=True)
                hidden, pooled = [*hidden, out.hidden_states[-2]], [*pooled, out.text_embeds]
                clip = Tokens(clip.embeds, ids.attention_mask.bool())
            else:
                sizes = self._size(name, "hidden_size"), self._size(name, "projection_dim")
                hidden.append(torch.zeros(len(captions), CLIP_TOKENS, sizes[0], dtype=on.dtype, device=on.device))
                pooled.append(torch.zeros(len(captions), sizes[1], dtype=on.dtype, device=on.device))
        if any(name in loaded for name in CLIPS):
            clip = Tokens(torch.cat(hidden, -1), clip.mask)
        return Conditioning((t5, clip), {"pooled": torch.cat(pooled, -1)})


def _nothing(count: int, width: int, like: Tensor) -> Tokens:
    """A sequence without tokens."""
    empty = torch.zeros(count, 0, width, dtype=like.dtype, device=like.device)
    return Tokens(empty, torch.zeros(count, 0, dtype=torch.bool, device=like.device))


def _present(folder: Path) -> dict[str, Encoder]:
    """Those that model_index.json names, and without one those that are there. Raises UserError for one that is named and not
    there: a download that is not complete is no wish to go without it."""
    file = folder / "model_index.json"
    index: dict[str, Any] = read_object(file, "model.path") if file.exists() else {}
    found = {}
    for name, encoder in ENCODERS.items():
        named = index.get(encoder.folder, [None])
        there = (folder / encoder.folder).is_dir()
        if isinstance(named, list) and any(named) and not there:
            raise UserError(
                f"model.path: '{folder}' has no folder '{encoder.folder}', which its model_index.json names. Fetch it, or "
                f'write "{encoder.folder}": [null, null] there to go without it: zeros take its place'
            )
        if there and (encoder.folder not in index or any(named)):
            found[name] = encoder
    return found
