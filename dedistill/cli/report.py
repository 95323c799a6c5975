"""The page of a run, finished, broken off or still going: losses, loss by noise level, meters, bad steps.

dedistill report runs/digits/dedistill                             # or its recipe
"""

import argparse
import sys

from dedistill.cli.command import add_overrides, command_parser, guarded, place, run_folder


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("report", __doc__)
    parser.add_argument("run", type=place, help="folder of a run, or its recipe")
    add_overrides(parser)
    args = parser.parse_args(argv)
    return guarded(lambda: run(args), debug=args.debug)


def run(args: argparse.Namespace) -> int:
    folder = run_folder(args.run, args.set)
    from dedistill.report.run import write_run_page

    print(f"done: {write_run_page(folder)}", file=sys.stderr)
    return 0
