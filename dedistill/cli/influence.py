"""How much each block changes its hidden states, as a heat map, and LoKr factors that fit a budget.

dedistill influence dedistill:digits/dedistill --budget 600K
dedistill train runs/digits/dedistill/influence/influence.toml      # the recipe with these factors; another may extend it
"""

import argparse
import sys
from pathlib import Path

from dedistill.cli.command import count, guarded, path, positive, recipe_parser
from dedistill.errors import say


def main(argv: list[str] | None = None) -> int:
    parser = recipe_parser("influence", __doc__, "recipe whose base network is measured, without any adapter")
    parser.add_argument("--prompts", default="16", help="a number of prompts from the data, or a text file, one per line")
    parser.add_argument("--sigmas", type=positive, default=8, help="noise levels: Euler steps of the trajectories measured")
    parser.add_argument("--batch", type=positive, default=4, help="prompts at once")
    parser.add_argument("--budget", type=count, help="trained parameters, e.g. 3.2B; default 600M, of a small network fewer")
    parser.add_argument("--out", type=path, help="output folder; default RUN/influence")
    args = parser.parse_args(argv)
    return guarded(lambda: run(args), debug=args.debug)


def run(args: argparse.Namespace) -> int:
    from dedistill.adapters.targets import adaptable
    from dedistill.data.encode import open_data
    from dedistill.evaluation.influence import measure, share_out, usual_budget
    from dedistill.evaluation.prompts import read_prompts, say_repeated
    from dedistill.io.ownership import claim
    from dedistill.recipe import load_recipe
    from dedistill.report.influence import all_alike, write_influence
    from dedistill.runs.model import open_base, sampling_device

    recipe = load_recipe(args.recipe, args.set)
    out = args.out or Path(recipe.run.out) / "influence"
    claim(out, "influence", "--out")
    prompts = read_prompts(args.prompts, lambda: open_data(recipe, sampling_device(), say).source)
    say_repeated(prompts, say)
    model = open_base(recipe)
    found = measure(model, list(prompts), sigmas=args.sigmas, batch=args.batch)
    shapes = adaptable(model.components.denoiser)
    budget = args.budget or usual_budget(found.blocks, shapes)
    factors, used = share_out(found.per_block(), shapes, budget)
    if words := all_alike(factors):
        say(words)
    page = write_influence(out, found, factors, used, budget, args.recipe)
    print(f"done: {page}, and influence.toml beside it with {used:,} trained parameters", file=sys.stderr)
    return 0
