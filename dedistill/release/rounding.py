"""From float32 to the dtype of a file, and how much of a small change survives it."""

from dataclasses import dataclass

import torch
from torch import Tensor

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
class Kept:
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
    def measure(cls, before: Tensor, after: Tensor, delta: Tensor) -> "Kept":
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

    def __add__(self, other: "Kept") -> "Kept":
        return Kept(*(getattr(self, f) + getattr(other, f) for f in self.__dataclass_fields__))

    def facts(self) -> dict[str, float]:
        """lost: share of the delta, along itself, that is gone: 1 - <kept, delta> / <delta, delta>; negative when too
        much arrived. error: |kept - delta| / |delta|, which also counts the noise of rounding. zeros: share of the
        weights with a delta that did not move at all."""
        return {
            "lost": 1 - self.along / self.wanted if self.wanted else 0.0,
            "error": (self.off / self.wanted) ** 0.5 if self.wanted else 0.0,
            "zeros": self.zeros / self.changed if self.changed else 0.0,
        }
