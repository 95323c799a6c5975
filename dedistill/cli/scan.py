"""What is in a data set: counts, sizes, caption lengths, near-duplicates and what cannot be used, with a page to look at.

dedistill scan photos/                                     # a folder of images with .txt, .caption or .json
dedistill scan shards/ list.parquet --out scan --tokenizer FLUX.1-schnell/tokenizer_2
"""

import argparse
import sys
from collections import Counter
from typing import TYPE_CHECKING

from dedistill.cli.command import command_parser, guarded, path, place, positive
from dedistill.errors import printable, say

if TYPE_CHECKING:
    from dedistill.data.images.types import ImageSet

SPLIT = {"auto": None, "true": True, "false": False}


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("scan", __doc__)
    parser.add_argument("paths", type=place, nargs="+", metavar="PATH", help="folder of images, folder of .tar shards, or list")
    parser.add_argument("--out", type=path, help="folder for the page, scan.json and the index; default none is written")
    parser.add_argument("--tokenizer", type=path, help="folder of a tokenizer: caption lengths in tokens, not words")
    parser.add_argument("--resolutions", type=positive, nargs="+", default=[512, 1024], help="resolutions of the buckets")
    parser.add_argument("--fields", nargs="+", default=[], help="keys or columns that hold captions; default the usual names")
    parser.add_argument("--file-column", default="file_name", help="column of a list that names the image")
    parser.add_argument("--split-lines", choices=SPLIT, default="auto", help="whether each line of a text is a caption")
    args = parser.parse_args(argv)
    return guarded(lambda: run(args), debug=args.debug)


def run(args: argparse.Namespace) -> int:
    from dedistill.data.images.index import build_index
    from dedistill.data.images.scan import scan, scan_lines
    from dedistill.data.usable import caption_words
    from dedistill.io.ownership import claim
    from dedistill.report.scan import write_scan_page

    if args.out:
        claim(args.out, "scan", "--out")
    file = args.out / "index.jsonl" if args.out else None
    index = build_index(_sources(args), file=file, say=say)
    facts = scan(index, resolutions=args.resolutions, tokenizer=args.tokenizer)
    for hint in caption_words(index):
        say(hint)
    print(printable("\n".join(scan_lines(facts))))
    if args.out:
        print(f"done: {write_scan_page(args.out, index, facts)}", file=sys.stderr)
    return 0


def _sources(args: argparse.Namespace) -> "list[ImageSet]":
    """One source per path, numbered where two would have the same name."""
    from dedistill.data.images.types import ImageSet

    options = {"fields": tuple(args.fields), "split_lines": SPLIT[args.split_lines], "file_column": args.file_column}
    sources = [ImageSet(path, missing_captions="quarantine", **options) for path in args.paths]
    titles = Counter(source.title for source in sources)
    return [
        ImageSet(s.path, f"{s.title}-{i}" if titles[s.title] > 1 else "", missing_captions="quarantine", **options)
        for i, s in enumerate(sources, 1)
    ]
