"""Text encoders of a pipeline's folder: tokenizers and networks of transformers, loaded when first used."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from dedistill.errors import UserError
from dedistill.io.json_files import read_object
from dedistill.models.family import CAPTIONS, Pass
from dedistill.models.pretrained import (
    by_headers,
    check_told_apart,
    check_vocabulary,
    load_tokenizer,
    load_whole,
    refuse_pointers,
)
from dedistill.models.swap import Swap, move_rest, without_room

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 16
"""Captions that are encoded at a time."""
CLIP_TOKENS = 77


@dataclass(frozen=True)
class Encoder:
    """One of a pipeline's text encoders."""

    folder: str
    tokenizer: str
    """Folder of its tokenizer."""
    kind: str
    """Its class in transformers."""
    vocabularies: tuple[tuple[str, ...], ...]
    """Sets of files by which its tokenizer knows its words; without any, transformers makes one that knows none."""
    published: Mapping[str, Any]
    """Its sizes in the published models, as their config.json says them."""
    padded: bool = False
    """Whether its table may be longer than its vocabulary."""
    tokens: int | None = CLIP_TOKENS
    """Of every caption; None: as many as the recipe says."""


CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_G = {
    **{"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20},
    **{"projection_dim": 1280, "hidden_act": "gelu"},
}
T5_XXL = {
    **{"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128},
    "feed_forward_proj": "gated-gelu",
}
CLIP_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
T5_FILES = (("tokenizer.json",), ("spiece.model",))
Loaded = tuple["PreTrainedTokenizerBase", nn.Module]


ENCODING = 2 << 30
"""Bytes for what a chunk of captions is encoded with beside the weights."""


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """Those of a transformer: its longest list of modules."""
    return list(max((m for m in network.modules() if isinstance(m, nn.ModuleList)), key=len, default=[]))


def placed(network: nn.Module, device: torch.device | str) -> nn.Module:
    """``network``, of which nothing is trained, on ``device``; where that has no room for all of it some of its blocks wait in
    the memory of the CPU. It computes the same, to the bit."""
    needed = sum(p.nbytes for p in network.parameters()) + ENCODING
    waiting = without_room(blocks_of(network), device, needed)
    move_rest(network, device, waiting)
    if waiting:
        Swap(waiting, device)
    return network.eval()


class PromptEncoders:
    """Those of a folder, by names of the family's own. Raises UserError for one that is not there whole."""

    def __init__(self, folder: Path, encoders: Mapping[str, Encoder]):
        self.folder, self.encoders = folder, encoders
        self._loaded: dict[str, Loaded] = {}
        for encoder in encoders.values():
            for name in (encoder.folder, encoder.tokenizer):
                if not (folder / name).is_dir():
                    raise UserError(f"model.path: '{folder}' has no folder '{name}', which captions need")
            if not any(all((folder / encoder.tokenizer / f).is_file() for f in files) for files in encoder.vocabularies):
                needed = ", or ".join(" and ".join(files) for files in encoder.vocabularies)
                place = folder / encoder.tokenizer
                raise UserError(f"model.path: '{place}' has no vocabulary; it needs {needed}. Fetch it with all files")
            refuse_pointers(folder / encoder.folder)

    def files(self) -> list[Path]:
        """All that decides what a caption becomes."""
        parts = (part for e in self.encoders.values() for part in (e.folder, e.tokenizer))
        return [file for part in parts for file in (self.folder / part).iterdir() if file.is_file()]

    @property
    def loaded(self) -> bool:
        return bool(self._loaded)

    def check(self) -> None:
        if not self._loaded:
            self._read(by_headers)

    def load(self, device: torch.device | str) -> None:
        loaded = {name: (tokenizer, placed(network, device)) for name, (tokenizer, network) in self._read(load_whole).items()}
        for name, (tokenizer, network) in loaded.items():
            check_told_apart(tokenizer, network, self.folder / self.encoders[name].folder, self._source)
        self._loaded = loaded

    @property
    def _source(self) -> str:
        return f"model.path: the text encoders in '{self.folder}'"

    def _read(self, network_of: Callable[..., nn.Module]) -> dict[str, Loaded]:
        """All of them, their networks by ``network_of``: ``load_whole``, or ``by_headers`` for an empty one."""
        import transformers
        from transformers.utils import logging

        logging.disable_progress_bar()
        places = {name: self.folder / e.tokenizer for name, e in self.encoders.items()}
        tokenizers = {name: load_tokenizer(transformers.AutoTokenizer, place, self._source) for name, place in places.items()}
        found: dict[str, Loaded] = {}
        for name, encoder in self.encoders.items():
            kind = getattr(transformers, encoder.kind)
            found[name] = tokenizers[name], network_of(kind, self.folder / encoder.folder, self._source, dtype="auto")
        for name, encoder in self.encoders.items():
            entries = cast(Any, found[name][1]).config.vocab_size
            check_vocabulary(tokenizers[name], entries, places[name], self._source, padded=encoder.padded)
        return found

    def on(self, device: torch.device | str) -> dict[str, Loaded]:
        """Tokenizers and networks by name, the networks where they are, or loaded onto ``device`` now."""
        if not self._loaded:
            self.load(device)
        return self._loaded

    def unload(self) -> None:
        """Free the memory of all of them."""
        self._loaded = {}

    def lengths(self, name: str, captions: list[str]) -> list[int]:
        """Tokens of each caption by one of the tokenizers, end token included, however long."""
        from transformers import AutoTokenizer

        place = self.folder / self.encoders[name].tokenizer
        own = self._loaded[name][0] if self._loaded else load_tokenizer(AutoTokenizer, place, "model.path")
        return [len(ids) for ids in own(captions)["input_ids"]]


def encoding_pass(
    folder: Path, encoders: Mapping[str, Encoder], length: int, *, hidden: bool = False, masked: bool = False
) -> dict[str, Pass]:
    """The encoding of a chunk of captions at full size, as shapes alone, on the device that is the default now.

    folder: the pipeline's, of whose encoders those that are there run; without any, the published ones. length: tokens of
    encoders without a number of their own; masked: and which of them only pad. hidden: the others tell all their hidden states.
    """
    import transformers

    files = {name: folder / encoder.folder / "config.json" for name, encoder in encoders.items()}
    there = {name for name, file in files.items() if file.exists()}
    networks: dict[str, Any] = {}
    for name in [name for name in encoders if name in there or not there]:
        kind = getattr(transformers, encoders[name].kind)
        sizes = read_object(files[name], "model.path") if there else encoders[name].published
        networks[name] = kind(kind.config_class(**sizes)).to(torch.bfloat16).eval()

    def captions() -> object:
        found = []
        for name, network in networks.items():
            own = encoders[name].tokens
            tokens = torch.ones(CHUNK, own or length, dtype=torch.long)
            options = {"output_hidden_states": hidden} if own else {"attention_mask": tokens if masked else None}
            out = network(tokens, **options)
            found.append(out.last_hidden_state if out.hidden_states is None else out.hidden_states[-2])
            del out  # with all the others, before the next one runs
        return found

    return {CAPTIONS: Pass([*networks.values()], captions)}
