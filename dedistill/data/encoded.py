"""Images and captions of the user's own, encoded beforehand: which sample, crop and caption a slot gets, and its tensors."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal

import numpy as np
import torch

from dedistill.data.cache import Store
from dedistill.data.images.buckets import Crop
from dedistill.data.images.index import Sample
from dedistill.data.order import choose, draw_samples, sample_indices
from dedistill.data.source import LEAST_UNITS, Batch
from dedistill.errors import UserError
from dedistill.flow import keyed
from dedistill.models.conditioning import Conditioning, Widths, collate, from_tensors, stored_shapes

HeldOut = float | Literal["auto"]


@dataclass(frozen=True)
class CroppedImage:
    """A sample with the crops that are encoded of it."""

    sample: Sample
    crops: tuple[Crop, ...]


@dataclass(frozen=True)
class Slot:
    image: CroppedImage
    crop: Crop
    caption: str
    name: str


def latent_key(sample: Sample, crop: Crop) -> str:
    """Content address of one encoded crop: the image's bytes and the window, not its name."""
    return hashlib.sha256(f"{sample.sha256} {crop.height} {crop.width} {crop.box}".encode()).hexdigest()[:32]


def text_key(caption: str) -> str:
    return hashlib.sha256(caption.encode()).hexdigest()[:32]


def read_text(texts: Store, caption: str, widths: Widths) -> Conditioning:
    """One caption of the cache, as long as it was stored. widths: of its encoders. Raises as ``Store.read``."""
    return from_tensors(texts.read(text_key(caption), stored_shapes(widths))).each(lambda t: t[None])


def split(images: Sequence[CroppedImage], share: HeldOut) -> tuple[list[CroppedImage], list[CroppedImage]]:
    """(train, held out), by the hash of each image's bytes: names and order do not matter.

    At least one is held out when ``share`` is above 0; copies of an image stay together. auto: 2 %, or more where that is
    less than the 16 images from which on intervals are given, but no more than a fifth.
    """
    order = sorted({p.sample.sha256 for p in images})
    part = min(0.2, max(0.02, LEAST_UNITS / max(1, len(order)))) if share == "auto" else float(share)
    held = set(order[: max(1, round(part * len(order))) if part else 0])
    return [p for p in images if p.sample.sha256 not in held], [p for p in images if p.sample.sha256 in held]


class EncodedImages:
    """A source whose samples are latents and text from stores. ``weights``: one per set of the recipe, in its order.

    latent_shape: what the latents of a crop of so many pixels (height, width) must be; text_widths: those
    of the text encoders. Raises UserError for a set of which nothing is left to train on.
    """

    name = "pictures"  # as data.source says it
    image = None

    def __init__(
        self,
        images: Sequence[CroppedImage],
        weights: Sequence[float],
        latents: Store,
        texts: Store,
        *,
        held_out: HeldOut,
        latent_shape: Callable[[int, int], tuple[int, ...]],
        text_widths: Widths,
    ):
        train, self._held = split(images, held_out)
        self._sets = [[p for p in train if p.sample.source == i] for i in range(len(weights))]
        self._weights = list(weights)
        for i, own in enumerate(self._sets):
            if not own:
                raise UserError(
                    f"data.sets.{i}: no image of this set is left to train on: {len(images)} of all sets are usable, "
                    f"{len(self._held)} of these are held out for validation. Add images, or lower data.held_out"
                )
        self._latents, self._texts, self._latent_shape, self._text_widths = latents, texts, cache(latent_shape), text_widths
        self._slots = lru_cache(maxsize=4)(self._slots_of)

    @property
    def digest(self) -> str:
        """Hash of everything a draw can come from: images, crops, captions, sets, weights, and how they are encoded."""
        images = [[(p.sample.sha256, p.crops, p.sample.captions) for p in s] for s in (*self._sets, self._held)]
        parts = [self._weights, images, self._latents.inputs, self._texts.inputs]
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def _slots_of(self, seed: int, step: int, batch: int, held_out: bool) -> list[Slot]:
        """What every position of a step gets."""
        places = np.arange(step * batch, (step + 1) * batch)
        purpose = "held-out" if held_out else "train"
        if held_out:
            # the name is part of the seed: another one would draw other samples
            chosen = [self._held[i] for i in sample_indices(seed, "pictures/held-out", places, len(self._held))]
        else:
            sets, indices = draw_samples(seed, places, [len(s) for s in self._sets], self._weights)
            chosen = [self._sets[s][i] for s, i in zip(sets, indices)]
        crops = choose(seed, f"{purpose}/crop", places, np.array([len(p.crops) for p in chosen]))
        captions = choose(seed, f"{purpose}/caption", places, np.array([len(p.sample.captions) for p in chosen]))
        drawn = [(p, p.crops[c], p.sample.captions[t]) for p, c, t in zip(chosen, crops, captions)]
        return [Slot(p, crop, caption, f"{p.sample.name} [{crop.width} x {crop.height}]") for p, crop, caption in drawn]

    def groups(self, seed: int, step: int, positions: np.ndarray, batch: int, *, held_out: bool = False) -> list[np.ndarray]:
        slots = self._slots(seed, step, batch, held_out)
        groups: dict[tuple[int, int], list[int]] = {}
        for position in positions:
            crop = slots[position].crop
            groups.setdefault((crop.height, crop.width), []).append(int(position))
        return [np.array(group) for group in groups.values()]

    def work(self, seed: int, step: int, positions: np.ndarray, batch: int, *, held_out: bool = False) -> int:
        crops = [self._slots(seed, step, batch, held_out)[p].crop for p in positions]
        return sum(crop.height * crop.width for crop in crops)

    def draw(self, seed: int, step: int, positions: np.ndarray, batch: int, *, held_out: bool = False) -> Batch:
        slots = [self._slots(seed, step, batch, held_out)[p] for p in positions]
        latents = []
        for slot in slots:
            shape = self._latent_shape(slot.crop.height, slot.crop.width)
            latents.append(self._latents.read(latent_key(slot.image.sample, slot.crop), {"latent": shape})["latent"])
        captions = [s.caption for s in slots]
        text = collate([read_text(self._texts, c, self._text_widths) for c in captions])
        names, images = [s.name for s in slots], [s.image.sample.sha256 for s in slots]
        return Batch(torch.stack(latents).float(), captions, names, text=text, image_ids=images)

    def names(self, seed: int, step: int, positions: np.ndarray, batch: int, *, held_out: bool = False) -> list[str]:
        slots = self._slots(seed, step, batch, held_out)
        return [slots[p].name for p in positions]

    def prompts(self, seed: int, count: int) -> list[str]:
        """Different captions as far as there are: of held-out images first, then of the others; then these once more."""
        chosen: list[str] = []
        for purpose, images in (("prompts", self._held), ("prompts/train", [p for own in self._sets for p in own])):
            if len(chosen) < count:
                more = sorted({c for p in images for c in p.sample.captions} - set(chosen))
                chosen += [more[i] for i in keyed.generator(seed, purpose).permutation(len(more))]
        return [chosen[i % len(chosen)] for i in range(count)]
