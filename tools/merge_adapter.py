r"""Merge a trained adapter into its unquantized base: a model folder that can be exported, used, or trained on again.

python tools/merge_adapter.py recipes/digits/dedistill.toml --out runs/digits/merged \
    --weights runs/digits/dedistill/snapshots/step-00000600.safetensors
"""

import argparse
import sys
from pathlib import Path

from dedistill.train import guarded


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", help="recipe the adapter was trained with; its model.path is the base")
    parser.add_argument("--weights", type=Path, required=True, help="snapshot, average or other adapter file")
    parser.add_argument("--out", type=Path, required=True, help="new model folder")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16", help="dtype of the written weights")
    parser.add_argument("--round", choices=["stochastic", "nearest"], default="stochastic", help="rounding to bf16")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args()
    return guarded(lambda: run(args), debug=args.debug)


def run(args: argparse.Namespace) -> int:
    from dedistill.quiet import quiet_dependencies

    quiet_dependencies()
    from dedistill.recipe import load_recipe
    from dedistill.release.merge import REPORT, merge_adapter
    from dedistill.release.rounding import Kept

    recipe = load_recipe(args.recipe, args.set)

    def row(name: str, kept: Kept) -> None:
        print(f"{name:60}{''.join(f'{value:9.4f}' for value in kept.facts().values())}", flush=True)

    print(f"{'layer':60}{'lost':>9}{'error':>9}{'zeros':>9}")
    merged = merge_adapter(recipe, args.weights, args.out, dtype=args.dtype, rounding=args.round, say=row)
    row(f"all {len(merged.layers)} layers", merged.total)
    print(f"done: {args.out}/ ({REPORT} has these numbers)", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
