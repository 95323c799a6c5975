"""Which images are held out, and which captions stand for the data."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dedistill.data.images.buckets import Crop
from dedistill.data.images.index import Sample
from dedistill.flow import keyed

LEAST_UNITS = 16
"""Different images or prompts from which on intervals are given: one for fewer, of any kind, would say nothing."""
HeldOut = float | Literal["auto"]


@dataclass(frozen=True)
class CroppedImage:
    """A sample with the crops that are encoded of it."""

    sample: Sample
    crops: tuple[Crop, ...]


def captions_of(images: Sequence[CroppedImage]) -> set[str]:
    return {caption for image in images for caption in image.sample.captions}


@dataclass(frozen=True)
class Split:
    """Images to train on, and those that are held out for validation."""

    train: list[CroppedImage]
    held: list[CroppedImage]

    def prompts(self, seed: int, count: int, own: Sequence[str] = ()) -> list[str]:
        """Different captions as far as there are: of held-out images first, then ``own`` prompts of the user's, then captions
        that are trained on; then these once more."""
        chosen: list[str] = []
        for purpose, images in (("prompts", self.held), ("prompts/train", self.train)):
            if len(chosen) < count:
                more = sorted(captions_of(images) - set(chosen))
                chosen += [more[i] for i in keyed.generator(seed, purpose).permutation(len(more))]
            if images is self.held:
                chosen = list(dict.fromkeys([*chosen, *own]))
        return [chosen[i % len(chosen)] for i in range(count)]


def split(images: Sequence[CroppedImage], share: HeldOut) -> Split:
    """By the hash of each image's bytes: names and order do not matter.

    At least one is held out when ``share`` is above 0; copies of an image stay together. auto: 2 %, or more where that is
    less than the 16 images from which on intervals are given, but no more than a fifth.
    """
    order = sorted({p.sample.sha256 for p in images})
    part = min(0.2, max(0.02, LEAST_UNITS / max(1, len(order)))) if share == "auto" else float(share)
    held = set(order[: max(1, round(part * len(order))) if part else 0])
    return Split([p for p in images if p.sample.sha256 not in held], [p for p in images if p.sample.sha256 in held])
