"""What is in a data set: counts, sizes, caption lengths, near-duplicates and what cannot be used, with a page to look at.

dedistill scan my_recipe.toml                              # counted as training will: what is left out, and which key takes it
dedistill scan photos/                                     # a folder of images with .txt, .caption or .json
dedistill scan shards/ list.parquet --out scan --tokenizer FLUX.1-schnell/tokenizer_2
"""

import argparse
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

from dedistill.cli.command import add_overrides, command_parser, guarded, path, place, positive
from dedistill.errors import UserError, printable, say
from dedistill.recipe.shipped import PREFIX

if TYPE_CHECKING:
    from dedistill.data.images.index import Index
    from dedistill.data.images.types import ImageSet

SPLIT_LINES = {"auto": None, "true": True, "false": False}


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("scan", __doc__)
    parser.add_argument(
        "paths", type=place, nargs="+", metavar="PATH", help="recipe, or folders of images, of .tar shards, or lists"
    )
    parser.add_argument("--out", type=path, help="folder for the page, scan.json and the index; default none is written")
    parser.add_argument("--tokenizer", type=path, help="folder of a tokenizer: caption lengths in tokens, not words")
    parser.add_argument(
        "--resolutions", type=positive, nargs="+", help="resolutions of the buckets; default 512 1024, or the recipe's"
    )
    parser.add_argument("--fields", nargs="+", default=[], help="keys or columns that hold captions; default the usual names")
    parser.add_argument("--file-column", default="file_name", help="column of a list that names the image")
    parser.add_argument("--split", help="split of folders that are divided, e.g. test, or all; default train, if several")
    parser.add_argument("--split-lines", choices=SPLIT_LINES, default="auto", help="whether each line of a text is a caption")
    add_overrides(parser)
    args = parser.parse_args(argv)
    recipes = [path for path in args.paths if is_recipe(path)]
    if recipes and len(args.paths) > 1:
        parser.error(f"'{recipes[0]}' is a recipe: give it alone")
    if recipes and (args.fields or args.split or args.file_column != "file_name" or args.split_lines != "auto"):
        parser.error("--fields, --file-column, --split and --split-lines stand in the recipe")
    return guarded(lambda: run(args), debug=args.debug)


def run(args: argparse.Namespace) -> int:
    from dedistill.data.images.index import build_index
    from dedistill.data.images.scan import scan, scan_lines
    from dedistill.data.usable import caption_words
    from dedistill.io.ownership import claim
    from dedistill.report.scan import write_scan_page

    if args.out:
        claim(args.out, "scan", "--out")
    if is_recipe(args.paths[0]):
        index, facts = _of_recipe(args)
    else:
        file = args.out / "index.jsonl" if args.out else None
        index = build_index(_sources(args), file=file, say=say)
        facts = scan(index, resolutions=args.resolutions or [512, 1024], tokenizer=args.tokenizer)
    for hint in caption_words(index):
        say(hint)
    print(printable("\n".join(scan_lines(facts))))
    if args.out:
        print(f"done: {write_scan_page(args.out, index, facts)}", file=sys.stderr)
    return 0


def is_recipe(path: str) -> bool:
    return path.endswith(".toml") or path.startswith(PREFIX)


def _of_recipe(args: argparse.Namespace) -> "tuple[Index, dict[str, Any]]":
    """What the recipe makes of its sets, under its own keys. An image without a caption is left out, not an error."""
    from dedistill.data.images.scan import scan
    from dedistill.data.usable import left_out_words, look
    from dedistill.recipe import load_recipe
    from dedistill.recipe.resolve import filled

    recipe = load_recipe(args.paths[0], args.set)
    data = recipe.data
    if data.source != "pictures":
        raise UserError(f"{recipe.where('data.source')}: '{data.source}' has no images of your own to look at", 2)
    tolerant = data.model_copy(update={"missing_captions": "quarantine"} if data.missing_captions == "error" else {})
    usable = look(recipe.model_copy(update={"data": tolerant}), say)
    resolutions, most = (
        args.resolutions or filled(data.resolutions, "data.resolutions"),
        filled(data.max_upscale, "data.max_upscale"),
    )
    facts = scan(usable.index, resolutions=resolutions, max_upscale=most, tokenizer=args.tokenizer)
    return usable.index, facts | {"recipe": left_out_words(usable, recipe)}


def _sources(args: argparse.Namespace) -> "list[ImageSet]":
    """One source per path, numbered where two would have the same name."""
    from dedistill.data.images.types import ImageSet

    options = {
        "fields": tuple(args.fields),
        "split_lines": SPLIT_LINES[args.split_lines],
        "file_column": args.file_column,
        "split": args.split,
    }
    sources = [ImageSet(path, missing_captions="quarantine", **options) for path in args.paths]
    titles = Counter(source.title for source in sources)
    return [
        ImageSet(s.path, f"{s.title}-{i}" if titles[s.title] > 1 else "", missing_captions="quarantine", **options)
        for i, s in enumerate(sources, 1)
    ]
