"""Randomness as a function of its place: nothing to save, nothing to restore, the same on any number of devices.

A draw is named by (seed, purpose, place...), e.g. (0, "noise", step, position). The name is hashed into the 128-bit
key of a Philox counter generator (Salmon et al. 2011), so two names never share a stream in practice. torch's own CPU
generator keeps only 32 bits of a seed, too few for the tens of millions of draws of a long run.
"""

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


def generator(seed: int, purpose: str, *place: int) -> np.random.Generator:
    """A fresh generator that depends on its name alone."""
    name = "/".join([str(seed), purpose, *map(str, place)])
    key = np.frombuffer(hashlib.blake2b(name.encode(), digest_size=16).digest(), dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


def noise(seed: int, purpose: str, step: int, positions: Iterable[int], shape: tuple[int, ...]) -> "Tensor":
    """Standard normal noise [len(positions), *shape], float32, one keyed draw per sample."""
    rows = [generator(seed, purpose, step, int(p)).standard_normal(shape, dtype=np.float32) for p in positions]
    import torch  # here: who only looks at images draws crops, and needs no torch

    return torch.from_numpy(np.stack(rows))


def uniforms(seed: int, purpose: str, step: int, shape: int | tuple[int, ...]) -> np.ndarray:
    """Uniform draws of a whole step, float64, strictly inside (0, 1). Slice it by position."""
    # random() may return exactly 0, where some inverse CDFs are infinite
    return generator(seed, purpose, step).random(shape).clip(2.0**-54, 1 - 2.0**-53)
