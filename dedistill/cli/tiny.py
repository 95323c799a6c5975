"""Write a tiny random model in the layout of the real one, to try a whole run without weights; a recipe for it goes to stdout.

dedistill tiny FAMILY models/tiny --images data/tiny > tiny.toml
dedistill train tiny.toml
"""

import argparse
import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from dedistill.cli.command import command_parser, guarded, path
from dedistill.cli.recipes import said_of
from dedistill.errors import UserError
from dedistill.models.registry import families, get_family
from dedistill.recipe import load_recipe
from dedistill.recipe.model_tables import Model
from dedistill.recipe.shipped import PREFIX, shipped_recipes
from dedistill.recipe.toml import table_to_toml

# --- A few captioned images to try things with before one has images of one's own ------------------------------------


SHAPES = [("red", "circle", "blue"), ("green", "square", "black"), ("blue", "circle", "red"), ("black", "square", "green")]
COLOURS = {"red": (200, 60, 50), "green": (70, 150, 80), "blue": (60, 90, 180), "black": (35, 35, 40)}


def write_samples(folder: Path, width: int, height: int) -> int:
    """Write JPEG files with the caption in a .txt beside each into ``folder``; returns how many."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, (colour, shape, ground) in enumerate(SHAPES):
        fall = np.linspace(1.0, 0.5, height)[:, None, None]  # no plain ground: a codec is asked for gradients too
        image = Image.fromarray((fall * COLOURS[ground] * np.ones((1, width, 1))).astype(np.uint8))
        draw, side = ImageDraw.Draw(image), min(width, height) // 2
        left, top = (width - side) // 2, (height - side) // 2
        (draw.ellipse if shape == "circle" else draw.rectangle)((left, top, left + side, top + side), COLOURS[colour])
        image.save(folder / f"sample{i}.jpg", quality=90)
        (folder / f"sample{i}.txt").write_text(f"a {colour} {shape} on a {ground} ground, dark at the bottom\n")
    return len(SHAPES)


# --- write a tiny random model in the layout of the real one, to try a whole run without weights ---------------------


SIDES = (256, 192)
"""Width and height of sample images for a model this small."""


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("tiny", __doc__.replace("FAMILY", families()[0]))
    parser.add_argument("family", help=f"model family: {', '.join(families())}")
    parser.add_argument("folder", type=path, help="new folder of the model; named as a published model, it is built like that")
    parser.add_argument("--images", type=path, metavar="FOLDER", help="write a few captioned sample images there too")
    args: argparse.Namespace = parser.parse_args(argv)
    return guarded(lambda: run(args), debug=args.debug)


def run(args: argparse.Namespace) -> int:
    with redirect_stdout(sys.stderr):  # of libraries: what this command prints is a recipe
        from dedistill.release.folder import new_folder

        family = get_family(args.family, "FAMILY")
    for place in filter(None, (args.folder, args.images)):
        if place.exists() and (not place.is_dir() or any(place.iterdir())):
            raise UserError(f"'{place}' exists and is not an empty folder: choose another, or remove it", exit_code=2)
    with redirect_stdout(sys.stderr), new_folder(args.folder) as folder:
        family.write_tiny(Model(family=args.family, path=str(args.folder)), folder, None, full_depth=False)
    message = f"{args.folder}/: a tiny random {args.family} model"
    if args.images:
        with new_folder(args.images) as folder:
            message += f"; {args.images}/: {write_samples(folder, *SIDES)} captioned images"
    base = _recipe_for(args.family)
    print(_recipe(base, args), end="")
    print(f"{message}\n{_next(base)}", file=sys.stderr)
    return 0


def _recipe_for(family: str) -> str | None:
    """The shipped recipe that trains an adapter on a model of that family on any machine."""
    for name, file in shipped_recipes().items():
        if said_of(file)[1].get("Hardware", "").startswith("any CPU"):
            recipe = load_recipe(PREFIX + name)
            if recipe.model.family == family and recipe.adapter is not None:
                return PREFIX + name
    return None


def _recipe(base: str | None, args: argparse.Namespace) -> str:
    model = {"path": str(args.folder)} if base else {"family": args.family, "path": str(args.folder)}
    images = {"data": {"sets": [{"path": str(args.images)}]}} if args.images else {}
    return table_to_toml(({"extends": base} if base else {}) | {"model": model} | images)


def _next(base: str | None) -> str:
    if base is None:
        return "put the lines above into a recipe of your own, and train it"
    return (
        "the lines above are a recipe for it; saved as tiny.toml:\n"
        "  dedistill train tiny.toml\n"
        "  dedistill posthoc runs/tiny\n"
        "  dedistill sweep tiny.toml --cfg 1 3 --prompts 2\n"
        "  dedistill export runs/tiny/posthoc/alpha_linear_0.9.safetensors --format lycoris --out exports/tiny.safetensors"
    )
