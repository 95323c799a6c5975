"""A few captioned images to try things with before one has images of one's own; drawn here, so nobody's rights are in them."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SHAPES = [("red", "circle", "blue"), ("green", "square", "black"), ("blue", "circle", "red"), ("black", "square", "green")]
COLOURS = {"red": (200, 60, 50), "green": (70, 150, 80), "blue": (60, 90, 180), "black": (35, 35, 40)}


def write_samples(folder: Path, width: int, height: int) -> int:
    """Write JPEG files with a .txt of a short and a long caption beside each into ``folder``; returns how many."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, (colour, shape, ground) in enumerate(SHAPES):
        fall = np.linspace(1.0, 0.5, height)[:, None, None]  # no plain ground: a codec is asked for gradients too
        image = Image.fromarray((fall * COLOURS[ground] * np.ones((1, width, 1))).astype(np.uint8))
        draw, side = ImageDraw.Draw(image), min(width, height) // 2
        left, top = (width - side) // 2, (height - side) // 2
        (draw.ellipse if shape == "circle" else draw.rectangle)((left, top, left + side, top + side), COLOURS[colour])
        image.save(folder / f"sample{i}.jpg", quality=90)
        short = f"a {colour} {shape} on {ground}"
        long = f"one {colour} {shape} in the middle of a {ground} ground, which is light at the top and dark at the bottom"
        (folder / f"sample{i}.txt").write_text(f"{short}\n{long}\n")
    return len(SHAPES)
