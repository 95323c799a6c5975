"""Images and captions of the user's own, encoded beforehand: which sample, crop and caption a slot gets, and its tensors."""

import hashlib
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from dedistill.data.cache import Shapes, Store
from dedistill.data.images.buckets import Crop, Sized
from dedistill.data.images.index import Sample
from dedistill.data.source import Batch, Slot
from dedistill.data.split import Split, check_trained
from dedistill.flow.keyed import choose, draw_samples, sample_indices
from dedistill.models.conditioning import Conditioning, Widths, collate, one_caption, stored_shapes

HELD = -1
"""Number of the set of held-out images, which comes after those of the recipe."""
FEATURES = "features"
"""Part of a latent's entry: what an encoder of image prompts makes of the crop."""


def framing_of(image: Sized, crop: Crop) -> Tensor:
    """Of Conditioning, of one crop."""
    left, top, right, bottom = crop.box
    corner = round(top * crop.height / (bottom - top)), round(left * crop.width / (right - left))
    return torch.tensor([image.height, image.width, *corner, crop.height, crop.width], dtype=torch.float32)


def latent_key(sample: Sample, crop: Crop) -> str:
    """Content address of one encoded crop: the image's bytes and the window, not its name."""
    return hashlib.sha256(f"{sample.sha256} {crop.height} {crop.width} {crop.box}".encode()).hexdigest()[:32]


def text_key(caption: str) -> str:
    return hashlib.sha256(caption.encode()).hexdigest()[:32]


def read_text(texts: Store, captions: list[str], shapes: Shapes) -> list[Conditioning]:
    """Captions of the cache, each as long as it was stored. shapes: as ``stored_shapes`` says. Raises as ``Store.read``."""
    return [one_caption(texts.read(text_key(caption), shapes)) for caption in captions]


class EncodedImages:
    """A source whose samples are latents and text from stores. ``weights``: one per set of the recipe, in its order.

    latent_shape: what the latents of a crop of so many pixels (height, width) must be; text_widths: those
    of the text encoders; features: the shape of what samples are told of their own images, None where they are not. Raises
    UserError for a set of which nothing is left to train on.
    """

    name = "pictures"  # as data.source says it
    image = None

    def __init__(
        self,
        images: Split,
        weights: Sequence[float],
        latents: Store,
        texts: Store,
        *,
        latent_shape: Callable[[int, int], tuple[int, ...]],
        text_widths: Widths,
        features: tuple[int, int] | None = None,
    ):
        self._split = images
        self._sets = [*([p for p in images.train if p.sample.source == i] for i in range(len(weights))), images.held]
        self._weights = list(weights)
        check_trained(images, len(weights))
        self._latents, self._texts, self._latent_shape = latents, texts, cache(latent_shape)
        self._text_shapes = stored_shapes(text_widths)
        self._features: Shapes = {FEATURES: features} if features else {}

    @property
    def digest(self) -> str:
        """Hash of everything a draw can come from: images, crops, captions, sets, weights, and how they are encoded."""
        images = [[(p.sample.sha256, p.crops, p.sample.captions) for p in s] for s in self._sets]
        parts = [self._weights, images, self._latents.inputs, self._texts.inputs]
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def slots(self, seed: int, step: int, batch: int, *, held_out: bool = False) -> list[Slot]:
        places = np.arange(step * batch, (step + 1) * batch)
        purpose = "held-out" if held_out else "train"
        if held_out:
            # the name is part of the seed: another one would draw other samples
            indices = sample_indices(seed, "pictures/held-out", places, len(self._sets[HELD]))
            sets = np.full(batch, HELD)
        else:
            sets, indices = draw_samples(seed, places, [len(s) for s in self._sets[:HELD]], self._weights)
        chosen = [self._sets[s][i] for s, i in zip(sets, indices)]
        crops = choose(seed, f"{purpose}/crop", places, np.array([len(p.crops) for p in chosen]))
        captions = choose(seed, f"{purpose}/caption", places, np.array([len(p.sample.captions) for p in chosen]))
        slots = []
        for image, s, i, c, t in zip(chosen, sets.tolist(), indices.tolist(), crops.tolist(), captions.tolist()):
            shape = height, width = image.crops[c].height, image.crops[c].width
            name = f"{image.sample.name} [{width} x {height}]"
            slots.append(Slot(name, (s, i, c), image.sample.captions[t], shape, height * width))
        return slots

    def draw(self, slots: Sequence[Slot]) -> Batch:
        drawn = [(self._sets[s][i], self._sets[s][i].crops[c]) for s, i, c in (slot.index for slot in slots)]
        entries = []
        for image, crop in drawn:
            shapes: Shapes = {"latent": self._latent_shape(crop.height, crop.width), **self._features}
            entries.append(self._latents.read(latent_key(image.sample, crop), shapes))
        latents = torch.stack([entry["latent"] for entry in entries]).float()
        features = torch.stack([entry[FEATURES] for entry in entries]) if self._features else None
        held_out = slots[0].index[0] == HELD  # in training nothing is counted by image
        ids = [self._split.unit(image) for image, _ in drawn] if held_out else []
        framing = torch.stack([framing_of(image.sample, crop) for image, crop in drawn])
        captions = [slot.caption for slot in slots]
        return Batch(latents, captions, image_ids=ids, framing=framing, features=features, text=self.text)

    def text(self, captions: list[str]) -> Conditioning:
        return collate(read_text(self._texts, captions, self._text_shapes))

    def prompts(self, seed: int, count: int) -> list[str]:
        return self._split.prompts(seed, count)
