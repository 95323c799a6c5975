"""Encode the images and captions of a recipe before training, or check what is encoded already.

dedistill prepare my_recipe.toml           # what training would do first; goes on when interrupted
dedistill prepare my_recipe.toml --check   # encodes nothing; exit code 1 when not all is there
"""

import argparse
from pathlib import Path

from dedistill.cli.command import recipe_parser, run_recipe
from dedistill.errors import say
from dedistill.recipe import Recipe
from dedistill.runs.missing import require_inputs


def main(argv: list[str] | None = None) -> int:
    parser = recipe_parser("prepare", __doc__, "recipe with data.source = 'pictures'")
    parser.add_argument("--check", action="store_true", help="compare the cache with the data, encode nothing")
    args: argparse.Namespace = parser.parse_args(argv)
    return run_recipe(args, check if args.check else encode)


def check(recipe: Recipe) -> int:
    """Say what of the data is encoded; 1 where something lacks or is damaged. Done by one process of a launcher's."""
    from dedistill.distributed.launcher import only_first

    if not only_first():
        return 0
    require_inputs(recipe)
    from dedistill.data.encode import check_cache

    problems = check_cache(recipe, say=say)
    for problem in problems:
        say(problem)
    return 1 if problems else 0


def encode(recipe: Recipe) -> int:
    """Encode what the cache lacks, shared among the processes of a launcher."""
    from dedistill.distributed.outside import StopRequests
    from dedistill.training.watchdog import Watchdog

    require_inputs(recipe)
    with StopRequests(), Watchdog(recipe.run.stuck_after, Path(recipe.data.cache or recipe.run.out)):
        return _encode(recipe)


def _encode(recipe: Recipe) -> int:
    import torch

    from dedistill.data.encode import check_cached, open_data
    from dedistill.distributed.launcher import require_gpu, start
    from dedistill.models.model import expected_parameters

    check_cached(recipe)
    require_gpu(lambda: expected_parameters(recipe))
    accelerator, world = start(cpu=not torch.cuda.is_available())
    facts = open_data(recipe, accelerator.device, say, world).facts
    if world.main:
        say(", ".join(f"{value:,} {key.replace('_', ' ')}" for key, value in facts.items()))
    world.shutdown()
    return 0
