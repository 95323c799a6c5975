"""Small captioned images, for tests."""

from pathlib import Path

import numpy as np
from PIL import Image

LONG = "a small house on the river with two trees and a dog and a cat and the moon in the sky and a red hat"


def write_image(file: Path, width: int, height: int, seed: int) -> None:
    """Smooth colours with some noise, unlike those of any other seed."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (3, 4, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    noisy = np.asarray(coarse, dtype=np.int64) + rng.integers(-20, 20, (height, width, 3))
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file)


def write_images(folder: Path, count: int, first: int = 0) -> Path:
    """``count`` captioned images of several shapes, each with a short and a long caption of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(first, first + count):
        write_image(folder / f"p{i:02d}.png", 96 + 16 * (i % 3), 112 - 16 * (i % 3), i)
        (folder / f"p{i:02d}.txt").write_text(f"the red sun {i}\n{LONG} {i}")
    return folder
