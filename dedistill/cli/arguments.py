"""Types for command lines: numbers out of range are refused before anything is loaded, and ``~`` is the home folder."""

import argparse
import math

from dedistill.cli.command import add_overrides, command_parser, path, place


def positive(text: str) -> int:
    """A whole number of at least 1."""
    return _number(text, int, lambda n: n >= 1, "a whole number of at least 1")


def whole(text: str) -> int:
    """A whole number of at least 0."""
    return _number(text, int, lambda n: n >= 0, "a whole number of at least 0")


def count(text: str) -> int:
    """A whole number of at least 1, which may end in K, M or B: 600M, 3.2B."""
    scale = {"K": 10**3, "M": 10**6, "B": 10**9}.get(text[-1:].upper())
    wanted = "a whole number of at least 1, or one such as 600M or 3.2B"
    if scale is None:
        return _number(text, int, lambda n: n >= 1, wanted)
    return round(scale * _number(text[:-1], float, lambda n: 1 <= n * scale < math.inf, wanted))


def finite(text: str) -> float:
    """A number that is neither infinite nor NaN."""
    return _number(text, float, math.isfinite, "a finite number")


def of_candidates(name: str, doc: str, folder: str) -> argparse.ArgumentParser:
    """The parser of commands that compare candidates of finished runs; ``dedistill.candidates.compared`` reads its result."""
    parser = command_parser(name, doc)
    parser.add_argument(
        "recipes", type=place, nargs="+", help="recipes whose finished runs are compared: files, or dedistill:NAME"
    )
    add_overrides(parser)
    parser.add_argument(
        "--candidates", nargs="+", help="of each run: base, last, posthoc, or names of posthoc files; default all"
    )
    parser.add_argument(
        "--data", type=place, help="recipe for prompts and held-out samples; default the first that has data of its own"
    )
    parser.add_argument("--prompts", default="64", help="a number of prompts from the data, or a text file, one per line")
    parser.add_argument("--out", type=path, help=f"output folder; default RUN/{folder} of the last recipe")
    return parser


def of_sweep(name: str, doc: str, folder: str, cfgs: list[float]) -> argparse.ArgumentParser:
    """``of_candidates`` for commands that make pictures; ``dedistill.candidates.sweep_grid`` and ``clip_judge`` read it."""
    parser = of_candidates(name, doc, folder)
    parser.add_argument("--cfg", type=finite, nargs="+", default=cfgs, help="guidance scales")
    parser.add_argument("--skip", type=whole, nargs="+", default=[0], help="first steps without guidance")
    parser.add_argument("--steps", type=positive, nargs="+", default=[], help="Euler steps; default each recipe's sample.steps")
    parser.add_argument("--seeds", type=whole, nargs="+", default=[0], help="seeds of the starting noise")
    parser.add_argument(
        "--clip", type=path, metavar="FOLDER", help="CLIPModel of transformers that scores pictures and prompts"
    )
    parser.add_argument("--real", type=path, metavar="FOLDER", help="real pictures to compare with in CLIP's space")
    return parser


def _number(text: str, kind: type, fits, wanted: str):
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if value != value or not fits(value):
        raise argparse.ArgumentTypeError(f"expects {wanted}, got '{text}'")
    return value
