"""What a model family provides. Everything else in the program knows only this."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Text:
    """Encoded captions: embeds [B, T, D], mask [B, T] bool (True: a real token), pooled [B, P]."""

    embeds: Tensor
    mask: Tensor
    pooled: Tensor

    def __len__(self) -> int:
        return self.embeds.shape[0]

    def to(self, device: torch.device | str) -> "Text":
        return Text(self.embeds.to(device), self.mask.to(device), self.pooled.to(device))

    def rows(self, index: Tensor | slice) -> "Text":
        return Text(self.embeds[index], self.mask[index], self.pooled[index])

    def expand(self, count: int) -> "Text":
        """A single caption repeated ``count`` times without copying."""
        return Text(*(t.expand(count, *t.shape[1:]) for t in (self.embeds, self.mask, self.pooled)))

    def where(self, dropped: Tensor, empty: "Text") -> "Text":
        """Rows where ``dropped`` [B] is True become ``empty``, a single caption: embeds, mask and pooled together."""
        e = empty.expand(len(self))
        return Text(
            torch.where(dropped[:, None, None], e.embeds, self.embeds),
            torch.where(dropped[:, None], e.mask, self.mask),
            torch.where(dropped[:, None], e.pooled, self.pooled),
        )

    def trimmed(self) -> "Text":
        """Without the columns that are padding in every row. Real tokens come first in each row."""
        longest = int(self.mask.sum(1).max())
        return replace(self, embeds=self.embeds[:, :longest], mask=self.mask[:, :longest])


@dataclass
class Components:
    """A loaded model: the denoiser that is trained or adapted, and what stays frozen around it."""

    net: nn.Module
    text: Any
    picture: tuple[int, int, int]
    """Channels, height and width of what the denoiser sees."""
    tokens: int
    """Picture tokens, which the resolution-dependent shift depends on."""
    mask: str = "bool"


class Family(Protocol):
    name: str

    def load(self, spec: Any, *, seed: int) -> Components:
        """The components a recipe's [model] table asks for, from a folder or with random weights."""

    def tiny(self, seed: int) -> Components:
        """The same classes, very small, random: for tests and rehearsals."""

    def save(self, parts: Components, folder: Path) -> None:
        """Write ``parts`` so that ``load`` with ``path = folder`` gives them back."""

    def encode_text(self, parts: Components, captions: list[str], length: int) -> Text:
        """Captions padded to ``length`` tokens. The empty caption has exactly one real token."""

    def velocity(self, parts: Components, net: nn.Module, noisy: Tensor, sigma: Tensor, text: Text) -> Tensor:
        """noise - data as ``net`` (the denoiser, or a module that wraps it) predicts it; noisy [B, C, H, W], sigma [B]."""

    def shift(self, tokens: int) -> float:
        """Resolution-dependent shift of sigma for that many picture tokens."""

    def blocks(self, net: nn.Module) -> list[nn.Module]:
        """The unit of checkpointing, compiling, offloading and sharding."""

    def presets(self, net: nn.Module) -> dict[str, list[str]]:
        """Named sets of layers of ``net`` as name patterns."""

    def export_key(self, name: str) -> str:
        """The name other programs know an adapted module by."""
