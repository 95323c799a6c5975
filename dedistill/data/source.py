"""What every source of samples provides."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from dedistill.text import Text


@dataclass(frozen=True)
class Batch:
    """Samples of some slots: pixels [B, C, H, W] as the denoiser sees them, their captions, and names to report them by.

    text: the captions, encoded already. noise and trajectory [B, K, C, H, W] come with stored pairs only;
    trajectory_sigmas [K] falls from 1 to 0.
    """

    pixels: Tensor
    captions: list[str]
    names: list[str]
    noise: Tensor | None = None
    trajectory: Tensor | None = None
    trajectory_sigmas: np.ndarray | None = None
    text: Text | None = None


class OneSize:
    """A source whose samples all have one shape."""

    def groups(self, seed: int, step: int, positions: np.ndarray, batch: int, *, held_out: bool = False) -> list[np.ndarray]:
        return [np.asarray(positions)]

    def work(self, seed: int, step: int, positions: np.ndarray, batch: int, *, held_out: bool = False) -> int:
        return len(positions)


class Source(Protocol):
    name: str
    picture: tuple[int, int, int] | None
    """Shape of every sample, None where they differ."""

    def draw(self, seed: int, step: int, positions: np.ndarray, batch: int, *, held_out: bool = False) -> Batch:
        """The samples of ``positions`` in step ``step``; a function of the arguments alone."""

    def groups(self, seed: int, step: int, positions: np.ndarray, batch: int, *, held_out: bool = False) -> list[np.ndarray]:
        """``positions`` parted by the shape of their samples, in the order of their first."""

    def work(self, seed: int, step: int, positions: np.ndarray, batch: int, *, held_out: bool = False) -> int:
        """How much work a group is, in any unit: what processes are to share evenly."""

    def names(self, seed: int, step: int, positions: np.ndarray, batch: int, *, held_out: bool = False) -> list[str]:
        """The names that ``draw`` gives, without reading any sample."""

    def prompts(self, seed: int, count: int) -> list[str]:
        """Captions to make pictures from, without noise."""
