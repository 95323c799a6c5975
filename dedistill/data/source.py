"""What every source of samples provides, and training without some of its samples."""

from collections.abc import Callable, Sequence
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
class Slot:
    """Which sample stands at a place of a run, and what is known of it before it is read."""

    name: str
    """To report it by, and to leave it out by."""
    index: tuple[int, ...]
    """By which its source finds it."""
    caption: str = ""
    """Where it is known already."""
    shape: tuple[int, ...] = ()
    """Slots of one shape, and of one part, go into one batch."""
    cost: int = 1
    """How much work it is, in any unit: what processes are to share evenly."""
    part: str = ""
    """Of a mixture, whose sample it is."""


@dataclass(frozen=True)
class Batch:
    """Samples of some slots: latents [B, C, H, W] as the denoiser sees them, and their captions.

    image_ids: what tells the images apart that the samples are of; empty where names do. framing [B, 6]: what was done to each
    image, as of Conditioning, where it is known. noise and trajectory
    [B, K, C, H, W] come with stored pairs only; trajectory_sigmas [K] falls from 1 to 0. features [B, T, D]: what an encoder of
    image prompts makes of the samples' own images, where they are to be told them. text: what ``captions``, or empty ones in
    place of some, are encoded; None where the model's own encoders do it.
    """

    latents: Tensor
    captions: list[str]
    noise: Tensor | None = None
    trajectory: Tensor | None = None
    trajectory_sigmas: np.ndarray | None = None
    image_ids: list[str] = field(default_factory=list)
    framing: Tensor | None = None
    features: Tensor | None = None
    text: Callable[[list[str]], Conditioning] | None = None


def needed(part: T | None) -> T:
    """A field of a :class:`Batch` of a source that fills it. Raises ValueError for another source."""
    if part is None:
        raise ValueError("the samples of this source do not have what is asked of them")
    return part


class Source(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def image(self) -> tuple[int, int, int] | None:
        """Shape of every sample, None where they differ."""

    def slots(self, seed: int, step: int, batch: int, *, held_out: bool = False) -> list[Slot]:
        """Of every position of step ``step``; a function of the arguments alone."""

    def draw(self, slots: Sequence[Slot]) -> Batch:
        """The samples of slots of one shape and part."""

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
        self.draw, self.prompts = source.draw, source.prompts

    def slots(self, seed: int, step: int, batch: int, *, held_out: bool = False) -> list[Slot]:
        slots = self.source.slots(seed, step, batch, held_out=held_out)
        out = {name for name, start in self.quarantined_from.items() if start <= step and not held_out}
        return [self._other(seed, step, p, batch, out) if slot.name in out else slot for p, slot in enumerate(slots)]

    def _other(self, seed: int, step: int, position: int, batch: int, out: set[str]) -> Slot:
        for other in keyed.generator(seed, "substitute", step, position).integers(2**62, size=TRIES).tolist():
            if (slot := self.source.slots(other, step, batch)[position]).name not in out:
                return slot
        raise UserError(f"data: step {step + 1}: {TRIES} draws gave quarantined samples only; too few others are left")
