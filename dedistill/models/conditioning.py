"""What a network is told beside the noisy sample: captions as encoders give them, caches keep them and networks take them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Tokens:
    """One sequence of each caption: embeds [B, T, D], mask [B, T] bool (True: a real token)."""

    embeds: Tensor
    mask: Tensor

    def trimmed(self) -> "Tokens":
        """Without the columns that are padding in every row. Real tokens come first in each row."""
        longest = int(self.mask.sum(1).max())
        return Tokens(self.embeds[:, :longest], self.mask[:, :longest])


@dataclass(frozen=True)
class Widths:
    """Of each sequence's embeddings, and of each vector by name: what a cache is compared with."""

    sequences: tuple[int, ...]
    vectors: Mapping[str, int] = field(default_factory=dict)
    lengths: tuple[int | None, ...] = ()
    """Tokens of each sequence, where that is the same number for all captions and recipes; none given: it is for none."""


@dataclass(frozen=True)
class Conditioning:
    """A batch of encoded captions: one or more sequences of tokens, and named vectors [B, P]; all of one length B."""

    sequences: tuple[Tokens, ...]
    vectors: Mapping[str, Tensor] = field(default_factory=dict)
    framing: Tensor | None = None
    """[B, 6] in pixels, of the images that the captions are of: original height and width, top and left of what is seen of it,
    at its own scale, and height and width of that. None: all of an image of the size that is asked for."""

    @classmethod
    def of(cls, embeds: Tensor, mask: Tensor, **vectors: Tensor) -> "Conditioning":
        """Of networks with a single sequence."""
        return cls((Tokens(embeds, mask),), vectors)

    @property
    def tokens(self) -> Tokens:
        """The only sequence, of networks that take one."""
        (only,) = self.sequences
        return only

    def __len__(self) -> int:
        return len(self.sequences[0].mask)

    def each(self, change: Callable[[Tensor], Tensor]) -> "Conditioning":
        """With every tensor changed alike."""
        sequences = tuple(Tokens(change(s.embeds), change(s.mask)) for s in self.sequences)
        framing = None if self.framing is None else change(self.framing)
        return Conditioning(sequences, {name: change(vector) for name, vector in self.vectors.items()}, framing)

    def to(self, device: torch.device | str) -> "Conditioning":
        """Embeddings and vectors on ``device``. Masks come to the CPU: lengths are read off them without waiting for it."""
        # waiting is for copies back alone: what they bring is read at once
        moved = lambda t: t.to(device, non_blocking=torch.device(device).type != "cpu")  # noqa: E731
        sequences = tuple(Tokens(moved(s.embeds), s.mask.cpu()) for s in self.sequences)
        framing = None if self.framing is None else moved(self.framing)
        return Conditioning(sequences, {name: moved(vector) for name, vector in self.vectors.items()}, framing)

    def index_select(self, index: Tensor | slice) -> "Conditioning":
        """Those rows."""
        return self.each(lambda t: t[index])

    def expand(self, count: int) -> "Conditioning":
        """A single caption repeated ``count`` times without copying."""
        return self.each(lambda t: t.expand(count, *t.shape[1:]))

    def trimmed(self) -> "Conditioning":
        """Every sequence without the columns that are padding in every row."""
        return replace(self, sequences=tuple(s.trimmed() for s in self.sequences))

    def tensors(self) -> dict[str, Tensor]:
        """By the names of a cache: "embeds", "mask" of the first sequence, "embeds.1" ... of others, vectors by their own."""
        named: dict[str, Tensor] = {}
        for i, sequence in enumerate(self.sequences):
            named |= {f"embeds{_ending(i)}": sequence.embeds, f"mask{_ending(i)}": sequence.mask}
        return named | dict(self.vectors)


def one_caption(tensors: Mapping[str, Tensor]) -> Conditioning:
    """A batch of the one caption that a cache holds as ``tensors``, by the names of ``Conditioning.tensors``."""
    rest = {name: tensor[None] for name, tensor in tensors.items()}
    embeds = sorted(name for name in rest if name.partition(".")[0] == "embeds")
    sequences = tuple(Tokens(rest.pop(name), rest.pop(name.replace("embeds", "mask"))) for name in embeds)
    return Conditioning(sequences, rest)


def stored_shapes(widths: Widths) -> dict[str, tuple[int | str, ...]]:
    """Of one caption's tensors in a cache; a name stands for a length that those of one sequence share."""
    shapes: dict[str, tuple[int | str, ...]] = {}
    for i, width in enumerate(widths.sequences):
        shapes |= {f"embeds{_ending(i)}": (f"tokens{_ending(i)}", width), f"mask{_ending(i)}": (f"tokens{_ending(i)}",)}
    return shapes | {name: (width,) for name, width in widths.vectors.items()}


def collate(captions: Sequence[Conditioning]) -> Conditioning:
    """One batch of several, each sequence padded with zeros to the longest. Raises ValueError for captions of other sequences
    or vectors than the first has."""
    if len({(len(c.sequences), *sorted(c.vectors)) for c in captions}) > 1:
        raise ValueError("captions of different encoders cannot be in one batch")
    sequences = []
    for same in zip(*(c.sequences for c in captions)):
        longest = max(s.mask.shape[1] for s in same)
        more = [longest - s.mask.shape[1] for s in same]
        embeds = torch.cat([pad(s.embeds, (0, 0, 0, n)) for s, n in zip(same, more)])
        sequences.append(Tokens(embeds, torch.cat([pad(s.mask, (0, n)) for s, n in zip(same, more)])))
    vectors = {name: torch.cat([c.vectors[name] for c in captions]) for name in captions[0].vectors}
    return Conditioning(tuple(sequences), vectors)


def _ending(i: int) -> str:
    return f".{i}" if i else ""
