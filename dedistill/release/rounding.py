"""From float32 to the dtype of a file, and what of a small change survives: in a merge, and where adapters are loaded."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dedistill.adapters.delta import weight_change
from dedistill.adapters.formats import Layers
from dedistill.flow import keyed

CHUNK = 1 << 22
"""Numbers rounded at a time."""


def round_stochastic(values: Tensor, seed: int, name: str) -> Tensor:
    """float32 -> bfloat16, up with the probability of what is cut off: right on average, a function of (seed, name).

    bfloat16 is the upper half of float32, so a uniform 16-bit number is added to the bits before the lower half is cut.
    What bfloat16 can hold stays as it is, and so do infinities and NaN. Values [...], contiguous or not, on the CPU.
    """
    flat, out = values.contiguous().reshape(-1), torch.empty(values.numel(), dtype=torch.bfloat16)
    rng = keyed.generator(seed, f"round/{name}")
    for start in range(0, len(flat), CHUNK):
        part = flat[start : start + CHUNK]
        noise = torch.from_numpy(rng.integers(0, 1 << 16, len(part), dtype="uint16")).int()
        cut = ((part.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32)
        out[start : start + CHUNK] = torch.where(part.isfinite(), cut, part).bfloat16()
    return out.reshape(values.shape)


@dataclass
class RoundingStats:
    """Sums over weights from which the losses of a merge are read; they add up over layers."""

    wanted: float = 0.0
    """|delta|^2"""
    along: float = 0.0
    """<kept, delta>"""
    off: float = 0.0
    """|kept - delta|^2"""
    zeros: int = 0
    """Weights that did not move although their delta is not 0."""
    changed: int = 0
    """Weights whose delta is not 0."""

    @classmethod
    def measure(cls, before: Tensor, after: Tensor, delta: Tensor) -> "RoundingStats":
        """before, after: the weight without and with the delta, both as the file stores them; delta float32."""
        kept = after.float() - before.float()
        nonzero = delta != 0
        return cls(
            wanted=float((delta.double() ** 2).sum()),
            along=float((kept.double() * delta.double()).sum()),
            off=float(((kept - delta).double() ** 2).sum()),
            zeros=int((nonzero & (kept == 0)).sum()),
            changed=int(nonzero.sum()),
        )

    def __add__(self, other: "RoundingStats") -> "RoundingStats":
        return RoundingStats(*(getattr(self, f) + getattr(other, f) for f in self.__dataclass_fields__))

    def facts(self) -> dict[str, float]:
        """kept: share of the delta, along itself, that arrived: <kept, delta> / <delta, delta>; by chance above 1 where it
        is rounded stochastically. error: |kept - delta| / |delta|, which also counts the noise of rounding. zeros: share of
        the weights with a delta that did not move at all."""
        return {
            "kept": self.along / self.wanted if self.wanted else 1.0,
            "error": (self.off / self.wanted) ** 0.5 if self.wanted else 0.0,
            "zeros": self.zeros / self.changed if self.changed else 0.0,
        }


SMALL = 3e-3
"""Below that share of the weights, a change that is added to bf16 and rounded to the nearest is no longer kept nearly whole."""
SAMPLED = 12
"""So many layers, spread over the network, are looked at."""


@dataclass(frozen=True)
class RelativeSize:
    """How large an adapter's change is against the weights, and what of it programs keep that add it into bf16 weights."""

    share: float
    """|delta| / |weight| over the layers that were looked at."""
    kept: float
    """Of the delta, along itself, where the sum is rounded to the nearest."""
    layers: int

    def __str__(self) -> str:
        if not self.share:
            return "it changes nothing: its factors make up a change of 0"
        told = f"its change is {self.share:.2g} of the weights it is added to"
        if self.share >= SMALL:
            return told
        return (
            f"{told}: of that a LoRA loader that adds it into bf16 weights keeps {self.kept:.0%}, the rest is rounded away. "
            "Take the merged model (dedistill merge rounds stochastically), load it into fp32 weights, or raise its strength"
        )


UNKNOWN = (
    "how large its change is against the weights is not known without them: name the base's folder with --model. Where it is "
    "below about 3e-3 of them, a LoRA loader that adds it into bf16 weights rounds much of it away (at 1e-3 about half: 43 to "
    "54 % is kept): take the merged model, load it into fp32 weights, or raise its strength"
)


class Weights(Protocol):
    """Tensors by name, read when they are asked for."""

    def __getitem__(self, name: str, /) -> Tensor: ...


def relative_size(layers: Layers, base: Weights) -> RelativeSize:
    """Measured on some of the ``layers``, with the weights of ``base``."""
    names = list(layers)[:: -(-len(layers) // SAMPLED)]
    total, weights = RoundingStats(), 0.0
    for name in names:
        weight = base[f"{name}.weight"]
        delta = weight_change(layers[name]).view_as(weight)
        before = weight.bfloat16()
        total += RoundingStats.measure(before, (before.float() + delta).bfloat16(), delta)
        weights += float((weight.double() ** 2).sum())
    share = (total.wanted / weights) ** 0.5 if weights else float("inf")
    return RelativeSize(share, total.facts()["kept"], len(names))
