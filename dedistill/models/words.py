"""A small frozen text encoder for laboratories: every word has a fixed random vector.

It stands where large models have language models: per-token embeddings with positions, padding, an end token, and an order-free
pooled vector from a second table, so that the order of words can only be read from the tokens.
"""

import re
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from dedistill.flow import keyed
from dedistill.models.conditioning import Conditioning, Widths

END, PAD = "</s>", "<pad>"


class WordEncoder:
    """Word-level encoder: embeds of width ``dim``, pooled vector of width ``pooled_dim``. Nothing in it is learned."""

    def __init__(self, dim: int, pooled_dim: int, max_length: int = 512):
        self.dim, self.pooled_dim, self.max_length = dim, pooled_dim, max_length
        self._token = lru_cache(maxsize=65536)(lambda word: _vector("token", word, dim))
        self._pooled = lru_cache(maxsize=65536)(lambda word: _vector("pooled", word, pooled_dim))

    @cached_property
    def _positions(self) -> Tensor:
        """Sinusoids [max_length, dim]."""
        place = torch.arange(self.max_length)[:, None].float()
        angle = place / 100.0 ** (2 * torch.arange((self.dim + 1) // 2)[None] / self.dim)
        return torch.cat([angle.sin(), angle.cos()], 1)[:, : self.dim]

    @property
    def widths(self) -> Widths:
        return Widths((self.dim,), {"pooled": self.pooled_dim})

    def tokens(self, captions: list[str]) -> list[int]:
        """Tokens of each caption, end token included, however long."""
        return [len(_words(caption)) + 1 for caption in captions]

    def check(self) -> None:
        """There are no files."""

    def unload(self) -> None:
        """There is nothing to free."""

    def config(self) -> dict[str, int]:
        return {"dim": self.dim, "pooled_dim": self.pooled_dim, "max_length": self.max_length}

    def __call__(self, captions: list[str], length: int) -> Conditioning:
        """Encode to ``length`` tokens; longer captions are cut but keep their end token."""
        rows = [[*_words(c)[: length - 1], END] for c in captions]
        padded = [row + [PAD] * (length - len(row)) for row in rows]
        embeds = torch.stack([torch.stack([self._token(w) for w in row]) for row in padded])
        mask = torch.tensor([[i < len(row) for i in range(length)] for row in rows])
        pooled = torch.stack([torch.stack([self._pooled(w) for w in row]).mean(0) for row in rows])
        return Conditioning.of(embeds + self._positions[:length], mask, pooled=pooled)


def _words(caption: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", caption.lower())


def _vector(table: str, word: str, dim: int) -> Tensor:
    return torch.from_numpy(keyed.generator(1234, f"{table}:{word}").standard_normal(dim, dtype="float32"))
