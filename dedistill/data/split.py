"""Which images are held out, and which captions stand for the data."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from dedistill.data.images.buckets import Crop
from dedistill.data.images.index import Sample
from dedistill.errors import UserError
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
    """Images to train on, and those that are held out for validation. near: the group of those that have near-duplicates."""

    train: list[CroppedImage]
    held: list[CroppedImage]
    near: dict[str, str] = field(default_factory=dict)

    def unit(self, image: CroppedImage) -> str:
        """What images that are no evidence of their own have in common: near-duplicates are one."""
        return self.near.get(image.sample.sha256, image.sample.sha256)

    def trained_captions(self) -> list[str]:
        """Those of no held-out image, each once, in a keyed order."""
        captions = sorted(captions_of(self.train) - captions_of(self.held))
        return [captions[i] for i in keyed.generator(0, "prompts/train").permutation(len(captions))]

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


def split(
    images: Sequence[CroppedImage],
    share: HeldOut,
    near: Sequence[Sequence[str]] = (),
    fold: Sequence[int] | None = None,
) -> Split:
    """By the hashes of the images' bytes: names and order do not matter.

    near: groups of hashes whose images are near-duplicates; copies and near-duplicates stay together. At least one image is
    held out when ``share`` is above 0. auto: 2 % of the different images, or more where that is less than the 16 from which on
    intervals are given, but no more than a fifth. Groups that would take more than that share of the images are trained on.
    fold: [k, K], to hold out the k-th of K parts instead, which have as many different images each, give or take one.
    """
    group = {sha256: min(some) for some in near for sha256 in some}
    sizes = Counter(group.get(p.sample.sha256, p.sample.sha256) for p in images)
    if fold:
        return _halves(images, set(sorted(sizes)[fold[0] - 1 :: fold[1]]), group)
    part = min(0.2, max(0.02, LEAST_UNITS / max(1, len(sizes)))) if share == "auto" else float(share)
    wanted, room = (max(1, round(part * n)) if part else 0 for n in (len(sizes), len(images)))
    held: set[str] = set()
    for unit in sorted(sizes):
        if len(held) < wanted and sizes[unit] <= room:
            held.add(unit)
            room -= sizes[unit]
    if wanted and not held:
        held = {min(sizes, key=lambda unit: (sizes[unit], unit))}
    return _halves(images, held, group)


def _halves(images: Sequence[CroppedImage], held: set[str], group: dict[str, str]) -> Split:
    whole = Split(list(images), [], group)
    parts: tuple[list[CroppedImage], list[CroppedImage]] = ([], [])
    for p in images:
        parts[whole.unit(p) in held].append(p)
    return Split(*parts, group)


def check_trained(images: Split, sets: int) -> None:
    """Raises UserError for one of ``sets`` of which nothing is left to train on: its share would go to the others."""
    trained = {p.sample.source for p in images.train}
    if empty := [i for i in range(sets) if i not in trained]:
        held, usable = len(images.held), len(images.train) + len(images.held)
        units = len({images.unit(p) for p in images.held})
        alike = f" ({units:,} different: near-duplicates stay together)" if units < held else ""
        raise UserError(
            f"data.sets.{empty[0]}: no image of this set is left to train on: {usable:,} of all sets are usable, "
            f"{held:,} of these are held out for validation{alike}. Add images, or lower data.held_out"
        )
