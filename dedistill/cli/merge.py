r"""Merge a trained adapter into its unquantized base: a model folder that can be exported, used, or trained on again.

dedistill merge dedistill:digits/dedistill --out runs/digits/merged \
    --weights runs/digits/dedistill/snapshots/step-00000600.safetensors
"""

import argparse
import sys

from dedistill.cli.command import guarded, path, recipe_parser
from dedistill.errors import amount


def main(argv: list[str] | None = None) -> int:
    parser = recipe_parser("merge", __doc__, "recipe the adapter was trained with; its model.path is the base")
    parser.add_argument("--weights", type=path, required=True, help="snapshot, average or other adapter file")
    parser.add_argument("--out", type=path, required=True, help="new model folder")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16", help="dtype of the written weights")
    parser.add_argument("--round", choices=["stochastic", "nearest"], default="stochastic", help="rounding to bf16")
    args = parser.parse_args(argv)
    return guarded(lambda: run(args), debug=args.debug)


def run(args: argparse.Namespace) -> int:
    from dedistill.recipe import load_recipe
    from dedistill.release.merge import REPORT, merge_adapter

    recipe = load_recipe(args.recipe, args.set)
    merged = merge_adapter(recipe, args.weights, args.out, dtype=args.dtype, rounding=args.round)
    print(f"{amount(len(merged.layers), 'layer')}: {merged.summary}")
    if merged.note:
        print(f"note: {merged.note}", file=sys.stderr)
    print(f"done: {args.out}/ ({REPORT} has the numbers of each layer)", file=sys.stderr)
    return 0
