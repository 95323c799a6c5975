"""The page of a run, finished, broken off or still going: losses, loss by noise level, meters, bad steps.

python tools/report_run.py runs/digits/dedistill                             # or its recipe
"""

import argparse
import sys
from pathlib import Path

from dedistill.train import guarded


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a run, or its recipe")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args()
    return guarded(lambda: run(args), debug=args.debug)


def run(args: argparse.Namespace) -> int:
    from dedistill.quiet import quiet_dependencies

    quiet_dependencies()
    from dedistill.recipe import load_recipe
    from dedistill.report.run_page import write_run_page

    folder = args.run if args.run.is_dir() else Path(load_recipe(args.run, args.set).run.out)
    print(f"done: {write_run_page(folder)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
