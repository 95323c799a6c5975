"""What a network is told beside the noisy sample: captions as encoders give them, caches keep them and networks take them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Tokens:
    """One sequence of each caption: embeds [B, T, D], mask [B, T] bool (True: a real token)."""

    embeds: Tensor
    mask: Tensor

    def padded(self, length: int) -> "Tokens":
        """With columns of padding (zeros) added up to ``length`` tokens; longer ones stay as they are."""
        more = max(0, length - self.embeds.shape[1])
        return Tokens(pad(self.embeds, (0, 0, 0, more)), pad(self.mask, (0, more)))

    def trimmed(self) -> "Tokens":
        """Without the columns that are padding in every row. Real tokens come first in each row."""
        longest = int(self.mask.sum(1).max())
        return Tokens(self.embeds[:, :longest], self.mask[:, :longest])


@dataclass(frozen=True)
class Widths:
    """Of each sequence's embeddings, and of each vector by name: what a cache is compared with."""

    sequences: tuple[int, ...]
    vectors: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Conditioning:
    """A batch of encoded captions: one or more sequences of tokens, and named vectors [B, P]; all of one length B."""

    sequences: tuple[Tokens, ...]
    vectors: Mapping[str, Tensor] = field(default_factory=dict)

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
        return combined(change, self)

    def to(self, device: torch.device | str) -> "Conditioning":
        """Embeddings and vectors on ``device``. Masks come to the CPU: lengths are read off them without waiting for it."""
        # waiting is for copies back alone: what they bring is read at once
        moved = lambda t: t.to(device, non_blocking=torch.device(device).type != "cpu")  # noqa: E731
        sequences = tuple(Tokens(moved(s.embeds), s.mask.cpu()) for s in self.sequences)
        return Conditioning(sequences, {name: moved(vector) for name, vector in self.vectors.items()})

    def index_select(self, index: Tensor | slice) -> "Conditioning":
        """Those rows."""
        return self.each(lambda t: t[index])

    def expand(self, count: int) -> "Conditioning":
        """A single caption repeated ``count`` times without copying."""
        return self.each(lambda t: t.expand(count, *t.shape[1:]))

    def trimmed(self) -> "Conditioning":
        """Every sequence without the columns that are padding in every row."""
        return Conditioning(tuple(s.trimmed() for s in self.sequences), self.vectors)

    def padded(self, lengths: Sequence[int]) -> "Conditioning":
        """Every sequence at least as long as ``lengths`` says."""
        return Conditioning(tuple(s.padded(n) for s, n in zip(self.sequences, lengths, strict=True)), self.vectors)

    def lengths(self) -> list[int]:
        return [s.mask.shape[1] for s in self.sequences]

    def where(self, dropped: Tensor, empty: "Conditioning") -> "Conditioning":
        """Rows where ``dropped`` [B] is True become ``empty``, a single caption: embeds, masks and vectors together."""
        lengths = [max(pair) for pair in zip(self.lengths(), empty.lengths())]
        own, other = self.padded(lengths), empty.padded(lengths).expand(len(self))

        def chosen(one: Tensor, two: Tensor) -> Tensor:
            rows = dropped.to(one.device, non_blocking=one.device.type != "cpu")
            return torch.where(rows.reshape(-1, *[1] * (one.ndim - 1)), two, one)

        return combined(chosen, own, other)

    def tensors(self) -> dict[str, Tensor]:
        """By the names of a cache: "embeds", "mask" of the first sequence, "embeds.1" ... of others, vectors by their own."""
        named: dict[str, Tensor] = {}
        for i, sequence in enumerate(self.sequences):
            named |= {f"embeds{_ending(i)}": sequence.embeds, f"mask{_ending(i)}": sequence.mask}
        return named | dict(self.vectors)


def from_tensors(tensors: Mapping[str, Tensor]) -> Conditioning:
    """The inverse of ``Conditioning.tensors``."""
    rest = dict(tensors)
    sequences: list[Tokens] = []
    while (name := f"embeds{_ending(len(sequences))}") in rest:
        sequences.append(Tokens(rest.pop(name), rest.pop(name.replace("embeds", "mask"))))
    return Conditioning(tuple(sequences), rest)


def stored_shapes(widths: Widths) -> dict[str, tuple[int | str, ...]]:
    """Of one caption's tensors in a cache; a name stands for a length that those of one sequence share."""
    shapes: dict[str, tuple[int | str, ...]] = {}
    for i, width in enumerate(widths.sequences):
        shapes |= {f"embeds{_ending(i)}": (f"tokens{_ending(i)}", width), f"mask{_ending(i)}": (f"tokens{_ending(i)}",)}
    return shapes | {name: (width,) for name, width in widths.vectors.items()}


def collate(captions: Sequence[Conditioning]) -> Conditioning:
    """One batch of several, padded to the longest."""
    lengths = [max(column) for column in zip(*(c.lengths() for c in captions))]
    return combined(lambda *tensors: torch.cat(tensors), *(c.padded(lengths) for c in captions))


def combined(change: Callable[..., Tensor], *batches: Conditioning) -> Conditioning:
    """What ``change`` makes of each tensor of the ``batches``, the same one of all of them at a time. Raises ValueError for
    batches of other sequences or vectors than the first has."""
    if len({(len(batch.sequences), *sorted(batch.vectors)) for batch in batches}) > 1:
        raise ValueError("captions of different encoders cannot be in one batch")
    made = [
        Tokens(change(*(s.embeds for s in same)), change(*(s.mask for s in same)))
        for same in zip(*(batch.sequences for batch in batches), strict=True)
    ]
    return Conditioning(tuple(made), {name: change(*(b.vectors[name] for b in batches)) for name in batches[0].vectors})


def _ending(i: int) -> str:
    return f".{i}" if i else ""
