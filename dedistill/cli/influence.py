"""How much each block changes its hidden states, as a heat map, and LoKr factors that fit a budget.

dedistill influence dedistill:digits/dedistill --budget 600K
dedistill train runs/digits/dedistill/influence/influence.toml      # the recipe with these factors; another may extend it
"""

import argparse
import sys
from pathlib import Path

from dedistill.cli.arguments import count, positive
from dedistill.cli.command import guarded, path, recipe_parser


def main(argv: list[str] | None = None) -> int:
    parser = recipe_parser("influence", __doc__, "recipe whose base network is measured, without any adapter")
    parser.add_argument("--prompts", default="16", help="a number of prompts from the data, or a text file, one per line")
    parser.add_argument("--sigmas", type=positive, default=8, help="noise levels: Euler steps of the trajectories measured")
    parser.add_argument("--batch", type=positive, default=4, help="prompts at once")
    parser.add_argument("--budget", type=count, default="600M", help="trained numbers, e.g. 600M or 3.2B")
    parser.add_argument("--out", type=path, help="output folder; default RUN/influence")
    args = parser.parse_args(argv)
    return guarded(lambda: run(args), debug=args.debug)


def run(args: argparse.Namespace) -> int:
    from dedistill.adapters.attach import dense_shapes
    from dedistill.adapters.influence import share_out
    from dedistill.base.quantize import linear_names
    from dedistill.candidates import read_prompts
    from dedistill.finished import open_base, sampling_device
    from dedistill.ours import claim
    from dedistill.prepare import open_data
    from dedistill.recipe import load_recipe
    from dedistill.report.console import say
    from dedistill.report.influence_page import write_influence
    from dedistill.sampling.influence import measure

    recipe = load_recipe(args.recipe, args.set)
    out = args.out or Path(recipe.run.out) / "influence"
    claim(out, "influence", "--out")
    prompts = read_prompts(args.prompts, lambda: open_data(recipe, sampling_device(), say).source)
    model = open_base(recipe)
    found = measure(model, list(prompts), sigmas=args.sigmas, batch=args.batch)
    shapes = dense_shapes(model.parts.net, linear_names(model.parts.net))
    factors, used = share_out(found.per_block(), shapes, args.budget)
    page = write_influence(out, found, factors, used, args.budget, args.recipe)
    print(f"done: {page}, and influence beside it with {used:,} trained numbers", file=sys.stderr)
    return 0
