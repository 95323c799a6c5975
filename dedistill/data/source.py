"""What every source of samples provides, and training without some of its samples."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np
from torch import Tensor

from dedistill.errors import UserError
from dedistill.flow import keyed
from dedistill.models.conditioning import Conditioning

T = TypeVar("T")

# --- what every source of samples provides ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Samples of some slots: latents [B, C, H, W] as the denoiser sees them, their captions, and names to report them by.

    image_ids: what tells the images apart that the samples are of; empty where names do. framing [B, 6]: what was done to each
    image, as of Conditioning, where it is known. noise and trajectory
    [B, K, C, H, W] come with stored pairs only; trajectory_sigmas [K] falls from 1 to 0. features [B, T, D]: what an encoder of
    image prompts makes of the samples' own images, where they are to be told them. text: what ``captions``, or empty ones in
    place of some, are encoded; None where the model's own encoders do it. part: of a mixture, whose samples they are.
    """

    latents: Tensor
    captions: list[str]
    names: list[str]
    noise: Tensor | None = None
    trajectory: Tensor | None = None
    trajectory_sigmas: np.ndarray | None = None
    image_ids: list[str] = field(default_factory=list)
    framing: Tensor | None = None
    features: Tensor | None = None
    text: Callable[[list[str]], Conditioning] | None = None
    part: str = ""


def needed(part: T | None) -> T:
    """A field of a :class:`Batch` of a source that fills it. Raises ValueError for another source."""
    if part is None:
        raise ValueError("the samples of this source do not have what is asked of them")
    return part


class OneSize:
    """A source whose samples all have one shape, and whose captions are encoded when they are needed."""

    def groups(self, seed: int, step: int, positions: np.ndarray, batch: int, *, held_out: bool = False) -> list[np.ndarray]:
        return [np.asarray(positions)]

    def work(self, seed: int, step: int, positions: np.ndarray, batch: int, *, held_out: bool = False) -> int:
        return len(positions)


class Source(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def image(self) -> tuple[int, int, int] | None:
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
        """Captions to make images from, without noise."""


# --- training without some samples -----------------------------------------------------------------------------------


TRIES = 64
"""Draws for one place until a sample that may be used is found."""


class QuarantineSource:
    """``source`` without the samples named in ``quarantined_from``, each from the step on that stands there.

    The sample at a place depends on (seed, step, position, quarantined_from): where a named one would stand, the same place is
    drawn again under other seeds until another one comes. Noise, sigma and dropout belong to the place, and stay.
    Held-out samples are left alone.
    """

    def __init__(self, source: Source, quarantined_from: dict[str, int]):
        self.source, self.name, self.image, self.quarantined_from = source, source.name, source.image, quarantined_from

    def groups(self, seed: int, step: int, positions: np.ndarray, batch: int, *, held_out: bool = False) -> list[np.ndarray]:
        """As the source's; a substitute is a group of its own."""
        positions = np.asarray(positions)
        other = self._seeds(seed, step, positions, batch, held_out)
        kept = np.array([p for p in positions if p not in other], dtype=np.int64)
        groups = self.source.groups(seed, step, kept, batch, held_out=held_out) if len(kept) else []
        return [*groups, *(np.array([p]) for p in other)]

    def work(self, seed: int, step: int, positions: np.ndarray, batch: int, *, held_out: bool = False) -> int:
        return self.source.work(self._seed(seed, step, positions, batch, held_out), step, positions, batch, held_out=held_out)

    def draw(self, seed: int, step: int, positions: np.ndarray, batch: int, *, held_out: bool = False) -> Batch:
        """``positions`` must be of one of the ``groups``."""
        return self.source.draw(self._seed(seed, step, positions, batch, held_out), step, positions, batch, held_out=held_out)

    def names(self, seed: int, step: int, positions: np.ndarray, batch: int, *, held_out: bool = False) -> list[str]:
        other = self._seeds(seed, step, positions, batch, held_out)
        return [self.source.names(other.get(p, seed), step, np.array([p]), batch, held_out=held_out)[0] for p in positions]

    def prompts(self, seed: int, count: int) -> list[str]:
        return self.source.prompts(seed, count)

    def _seed(self, seed: int, step: int, positions: np.ndarray, batch: int, held_out: bool) -> int:
        other = self._seeds(seed, step, positions, batch, held_out)
        if not other:
            return seed
        if len(positions) > 1:
            raise ValueError(f"positions {list(positions)} of step {step} are not of one group")
        return next(iter(other.values()))

    def _seeds(self, seed: int, step: int, positions: np.ndarray, batch: int, held_out: bool) -> dict[int, int]:
        """Places that get a substitute -> the seed it is drawn under."""
        out = {name for name, start in self.quarantined_from.items() if start <= step}
        if held_out or not out:
            return {}
        names = self.source.names(seed, step, np.asarray(positions), batch)
        return {int(p): self._other(seed, step, int(p), batch, out) for p, name in zip(positions, names) if name in out}

    def _other(self, seed: int, step: int, position: int, batch: int, out: set[str]) -> int:
        for other in keyed.generator(seed, "substitute", step, position).integers(2**62, size=TRIES).tolist():
            if self.source.names(other, step, np.array([position]), batch)[0] not in out:
                return other
        raise UserError(f"data: step {step + 1}: {TRIES} draws gave quarantined samples only; too few others are left")
