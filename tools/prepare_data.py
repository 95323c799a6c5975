"""Encode the pictures and captions of a recipe before training, or check what is encoded already.

python tools/prepare_data.py recipes/flux_schnell.toml           # what training would do first; goes on when interrupted
python tools/prepare_data.py recipes/flux_schnell.toml --check   # encodes nothing; exit code 1 when not all is there
"""

import argparse
import sys

from dedistill import train


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", help="recipe with data.source = 'pictures'")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    parser.add_argument("--check", action="store_true", help="compare the cache with the data, encode nothing")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args()
    settings = [word for pair in args.set for word in ("--set", pair)]
    flags = ["--check-cache" if args.check else "--cache-only", *(["--debug"] if args.debug else [])]
    return train.main([args.recipe, *settings, *flags])


if __name__ == "__main__":
    sys.exit(main())
