"""What graphics cards have, as their makers publish it, and what a step would make of that."""

import math
from dataclasses import dataclass

from dedistill.forecast.meter import Work

GIB = 1 << 30
CONTEXT = 0.6 * GIB
"""Beside what torch allocates: CUDA's context, its loaded kernels, and workspaces of cuBLAS."""
SPLIT = 1.08
"""What the allocator holds, for what is in use: at most so many times as much in the runs of docs/LOG.md (1.00 to 1.08)."""


@dataclass(frozen=True)
class Card:
    name: str
    gb: int
    """Of memory, as it is sold."""
    tflops: float
    """Of dense bf16 matrix products that are added up in float32."""
    tops: float
    """Of dense int8 matrix products."""
    fp8: float
    """TFLOP/s of dense fp8 matrix products that are added up in float32; 0: it has none."""
    gb_s: float
    """Of its memory."""
    link_gb_s: float
    """Of PCIe with 16 lanes, in one direction."""
    source: str

    def does(self, work: Work) -> bool:
        """Whether it has the arithmetic."""
        return self.fp8 > 0 or not work.fp8

    def seconds(self, work: Work) -> float:
        """No step with ``work`` takes less: matrix products at the full rate, all else at that of the memory, and copies from
        the CPU's meanwhile. Infinite where the card does not do it."""
        if not self.does(work):
            return math.inf
        kinds = ((work.flops, self.tflops), (work.integer, self.tops), (work.fp8, self.fp8 or math.inf))
        computed = sum(count / (rate * 1e12) for count, rate in kinds) + work.moved / (self.gb_s * 1e9)
        return max(computed, work.copied / (self.link_gb_s * 1e9))


CARDS = (
    Card("RTX 4070", 12, 58.3, 233, 116.6, 504, 31.5, "NVIDIA, Ada GPU architecture"),
    Card("RTX 4080", 16, 97.5, 390, 194.9, 717, 31.5, "NVIDIA, Ada GPU architecture"),
    Card("RTX 3090", 24, 71.0, 284, 0, 936, 31.5, "NVIDIA, Ampere GA102 GPU architecture"),
    Card("RTX 4090", 24, 165.2, 661, 330.3, 1008, 31.5, "NVIDIA, Ada GPU architecture"),
    Card("RTX 5090", 32, 209.5, 838, 419, 1792, 63, "NVIDIA, RTX Blackwell GPU architecture"),
    Card("L40S", 48, 362.0, 733, 733, 864, 31.5, "NVIDIA, L40S datasheet"),
    Card("A100 80GB", 80, 312.0, 624, 0, 2039, 31.5, "NVIDIA, A100 datasheet (SXM)"),
    Card("H100", 80, 989.0, 1979, 1979, 3350, 63, "NVIDIA, H100 datasheet (SXM, without sparsity)"),
    Card("H200", 141, 989.0, 1979, 1979, 4800, 63, "NVIDIA, H200 datasheet (SXM, without sparsity)"),
)
FITS, TIGHT, NO = "fits", "tight", "no"


def room_on(gb: float) -> float:
    """Bytes that torch may take of a card of ``gb``."""
    return gb * GIB * 0.98 - CONTEXT  # a card of 24 GB shows 23.5 to 24 GiB


def fit(peak: float, room: float) -> str:
    """Of a step with so many bytes in use at once where torch may take ``room``: tight where it depends on how the allocator
    fares."""
    return FITS if peak * SPLIT <= room else TIGHT if peak <= room else NO
