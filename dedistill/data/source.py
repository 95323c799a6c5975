"""What every source of samples provides."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Samples of some slots: pixels [B, C, H, W] in [-1, 1], their captions, and names to report them by.

    noise and trajectory [B, K, C, H, W] come with stored pairs only; trajectory_sigmas [K] falls from 1 to 0.
    """

    pixels: Tensor
    captions: list[str]
    names: list[str]
    noise: Tensor | None = None
    trajectory: Tensor | None = None
    trajectory_sigmas: np.ndarray | None = None


class Source(Protocol):
    name: str
    picture: tuple[int, int, int]

    def draw(self, seed: int, step: int, positions: np.ndarray, batch: int, *, held_out: bool = False) -> Batch:
        """The samples of ``positions`` in step ``step``; a function of the arguments alone."""

    def prompts(self, seed: int, count: int) -> list[str]:
        """Captions to make pictures from, without noise."""
