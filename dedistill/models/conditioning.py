"""Encoded captions as tensors: what text encoders give, caches keep and networks take."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad


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

    def padded(self, length: int) -> "Text":
        """With columns of padding (zeros) added up to ``length`` tokens; longer text stays as it is."""
        more = max(0, length - self.embeds.shape[1])
        return replace(self, embeds=pad(self.embeds, (0, 0, 0, more)), mask=pad(self.mask, (0, more)))

    def trimmed(self) -> "Text":
        """Without the columns that are padding in every row. Real tokens come first in each row."""
        longest = int(self.mask.sum(1).max())
        return replace(self, embeds=self.embeds[:, :longest], mask=self.mask[:, :longest])

    def where(self, dropped: Tensor, empty: "Text") -> "Text":
        """Rows where ``dropped`` [B] is True become ``empty``, a single caption: embeds, mask and pooled together."""
        length = max(self.embeds.shape[1], empty.embeds.shape[1])
        own, other = self.padded(length), empty.padded(length).expand(len(self))
        return Text(
            torch.where(dropped[:, None, None], other.embeds, own.embeds),
            torch.where(dropped[:, None], other.mask, own.mask),
            torch.where(dropped[:, None], other.pooled, own.pooled),
        )


def stack(texts: Sequence[Text]) -> Text:
    """One batch of several, padded to the longest."""
    length = max(t.embeds.shape[1] for t in texts)
    padded = [t.padded(length) for t in texts]
    return Text(*(torch.cat([getattr(t, name) for t in padded]) for name in ("embeds", "mask", "pooled")))
