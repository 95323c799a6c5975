"""Images in prompts, ``a red cat <image:photos/cat.jpg weight=0.5>``, and images that samples are told of in training.

To a network they are further sequences of tokens beside the text's, one for each image of a prompt. A ``weight`` is what an
image's tokens count for in attention: ln(weight) is added to their scores, so 1 is as they are, 0 is none of them, and 1 / n
gives n images the say of one. A ``scale`` multiplies what the encoder makes of the image instead; but the network
normalizes what it takes in, so it is a poor knob: it is for results that were made with it.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NoReturn, Protocol

import torch
from PIL import Image, ImageOps
from torch import Tensor

from dedistill.errors import UserError
from dedistill.models.conditioning import Conditioning, Tokens

WEIGHTS, SCALES = "image_weights", "image_scales"
"""Vectors [B, n] of a conditioning, one number for each of its images; there only where one is not 1."""
_NAMED = re.compile(r"\s*<image:([^<>]*)>\s*")
_SETTING = re.compile(r"\s+(\w+)=(\S*)$")


@dataclass(frozen=True)
class ImagePrompt:
    """An image that a prompt names."""

    image: str | Image.Image
    """A file, or the image itself."""
    weight: float = 1.0
    scale: float = 1.0


class ImageEncoder(Protocol):
    """What makes features [n, T, D] of images."""

    shape: tuple[int, int]
    """T and D; known before anything is loaded."""

    def __call__(self, images: Sequence[Image.Image], device: torch.device | str) -> Tensor: ...

    def files(self) -> list[Path]:
        """All that decides what it computes."""

    def unload(self) -> None:
        """Free its memory; what is asked next loads again."""


@dataclass
class ImagePrompts(ABC):
    """A model's encoder of image prompts, and what it has made of files so far."""

    encoder: ImageEncoder
    known: dict[str, Tensor] = field(default_factory=dict)
    """Path -> features [T, D], on the CPU."""

    @abstractmethod
    def tokens(self, text: Conditioning) -> Conditioning:
        """``text`` with its images' features as tokens of the text's width."""

    def features(self, images: Sequence[str | Image.Image], device: torch.device | str) -> list[Tensor]:
        """[T, D] of each, on the CPU. The encoder is unloaded afterwards."""
        found = {i: self.known[image] for i, image in enumerate(images) if isinstance(image, str) and image in self.known}
        if new := [i for i in range(len(images)) if i not in found]:
            made = self.encoder([_opened(images[i]) for i in new], device).cpu()
            self.encoder.unload()
            found |= dict(zip(new, made, strict=True))
            self.known |= {path: found[i] for i in new if isinstance(path := images[i], str)}
        return [found[i] for i in range(len(images))]

    def told(self, text: Conditioning, prompts: Sequence[Sequence[ImagePrompt]], device: torch.device | str) -> Conditioning:
        """``text`` with the images of each of its rows; those of weight 0 are left out."""
        rows = [[image for image in images if image.weight > 0] for images in prompts]
        found = iter(self.features([image.image for row in rows for image in row], device))
        features = [[next(found) for _ in row] for row in rows]
        empty, sequences = torch.zeros(self.encoder.shape), list(text.sequences)
        count = max(map(len, rows), default=0)
        for i in range(count):
            there = torch.tensor([i < len(row) for row in rows])
            embeds = torch.stack([row[i] if i < len(row) else empty for row in features])
            sequences.append(Tokens(embeds, there[:, None].expand(-1, len(empty))))
        vectors = dict(text.vectors)
        for name, values in ((WEIGHTS, [[i.weight for i in r] for r in rows]), (SCALES, [[i.scale for i in r] for r in rows])):
            if any(value != 1 for row in values for value in row):
                vectors[name] = torch.tensor([row + [1.0] * (count - len(row)) for row in values])
        return replace(text, sequences=tuple(sequences), vectors=vectors)


def told_own(text: Conditioning, features: Tensor, told: Tensor) -> Conditioning:
    """``text`` with one image for each of its rows where ``told`` [B] is True. features: [B, T, D]."""
    own = Tokens(features, told[:, None].expand(features.shape[:2]))
    return replace(text, sequences=(*text.sequences, own))


def parted(prompt: str) -> tuple[str, tuple[ImagePrompt, ...]]:
    """The words of a prompt, and the images that it names. Raises UserError for one that is not well formed."""
    if "<image:" not in prompt:
        return prompt, ()
    images = tuple(_image(found[1], prompt) for found in _NAMED.finditer(prompt))
    if prompt.count("<image:") != len(images):
        _wrong(prompt, "an image is not closed by >")
    return _NAMED.sub(" ", prompt).strip(), images


def _image(named: str, prompt: str) -> ImagePrompt:
    settings: dict[str, float] = {}
    while found := _SETTING.search(named):
        named, key = named[: found.start()], found[1]
        try:
            settings[key] = float(found[2])
        except ValueError:
            _wrong(prompt, f"{key}={found[2]} is no number")
        if key not in ("weight", "scale"):
            _wrong(prompt, f"an image has no '{key}', only weight and scale")
        if not 0 <= settings[key] < float("inf"):
            _wrong(prompt, f"{key}={found[2]}: at least 0 is needed")
    if not named.strip():
        _wrong(prompt, "an image has no path")
    return ImagePrompt(named.strip(), **settings)


def _wrong(prompt: str, why: str) -> NoReturn:
    raise UserError(f"prompt '{prompt}': {why}; an image is named as in <image:cat.jpg weight=0.5>", 2)


def _opened(path: str | Image.Image) -> Image.Image:
    if isinstance(path, Image.Image):
        return path.convert("RGB")
    try:
        with Image.open(Path(path).expanduser()) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise UserError(f"image prompt '{path}' cannot be read: {getattr(e, 'strerror', None) or e}", 2) from e
