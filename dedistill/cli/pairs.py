"""Store pairs (noise, caption, trajectory points) of a model, to distil or straighten it; run again to continue.

dedistill pairs dedistill:digits/teacher --out runs/digits/pairs --count 1536 --cfg 3 --steps 16 --points 4
dedistill launch --config_file launch/ddp.yaml --num_processes 8 pairs my_recipe.toml --base --out pairs --prompts prompts.txt
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dedistill.cli.command import SOLVERS, finite, guarded, guider, path, positive, recipe_parser, whole
from dedistill.errors import amount, say

if TYPE_CHECKING:
    from dedistill.recipe import Recipe
    from dedistill.sampling.pairs import HasPrompts


def main(argv: list[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    return guarded(lambda: run(args), debug=args.debug)


def arguments() -> argparse.ArgumentParser:
    parser = recipe_parser("pairs", __doc__, "recipe of the teacher; its finished run is used")
    parser.add_argument("--base", action="store_true", help="the teacher is the model that the recipe starts from")
    parser.add_argument("--out", type=path, required=True, help="folder of the shards")
    parser.add_argument("--count", type=positive, default=1536, help="number of pairs")
    parser.add_argument("--prompts", metavar="FILE", help="text, a prompt per line, or a table; default the recipe's captions")
    parser.add_argument("--cfg", type=finite, default=3.0, help="guidance scale baked into the pairs")
    parser.add_argument("--guider", type=guider, metavar="NAME", help="default the recipe's sample.guider")
    parser.add_argument("--solver", choices=SOLVERS, help="default the recipe's sample.solver")
    parser.add_argument("--steps", type=positive, default=16, help="its steps")
    parser.add_argument("--points", type=positive, default=4, help="intervals between stored states; must divide --steps")
    parser.add_argument("--seed", type=whole, default=0, help="seed of noise and prompts")
    parser.add_argument("--shard-size", type=positive, default=256, help="pairs per shard; a killed process loses its last one")
    return parser


def run(args: argparse.Namespace) -> int:
    import torch

    from dedistill.data.pairs import PairSource
    from dedistill.distributed.launcher import ranks, start
    from dedistill.distributed.world import World
    from dedistill.evaluation.prompts import say_repeated
    from dedistill.flow.guidance import guider_of
    from dedistill.recipe import load_recipe
    from dedistill.report.pairs import write_pairs_page
    from dedistill.runs.model import open_base, open_finished
    from dedistill.sampling.pairs import make_pairs, teacher_hash
    from dedistill.sampling.sampler import Sampling

    recipe = load_recipe(args.recipe, args.set)
    world = start(cpu=not torch.cuda.is_available())[1] if ranks() > 1 else World()
    source = prompts_of(recipe, args.prompts)
    model = open_base(recipe) if args.base else open_finished(recipe)
    guidance = guider_of(args.guider or recipe.sample.guider, args.cfg)
    if world.main:
        say_repeated(source.prompts(args.seed, args.count), say)
    facts = make_pairs(
        model,
        source,
        args.out,
        teacher=teacher_hash(model),
        count=args.count,
        sampling=Sampling(solver=args.solver or recipe.sample.solver, steps=args.steps, guidance=guidance),
        points=args.points,
        seed=args.seed,
        shard_size=args.shard_size,
        progress=lambda done, total: _progress(done, total) if world.main else None,
        world=world,
    )
    if world.main:
        left_out = sum(shard.get("quarantined", 0) for shard in facts["shards"])
        page = write_pairs_page(args.out, PairSource(args.out), model.decode)
        made = amount(facts["count"] - left_out, "pair")
        out = f", {amount(left_out, 'pair')} left out (not finite or saturated)" if left_out else ""
        print(f"done: {made} in {amount(len(facts['shards']), 'shard')}{out}, {args.out}/; {page}", file=sys.stderr)
    world.shutdown()
    return 0


def _progress(done: int, total: int) -> None:
    print(f"pairs {done}/{total}", file=sys.stderr, flush=True)


def prompts_of(recipe: "Recipe", file: str | None) -> "HasPrompts":
    """``file``'s, else the captions that ``recipe`` trains on, of which nothing is encoded."""
    from dedistill.data.encode import open_source
    from dedistill.data.usable import look
    from dedistill.evaluation.prompts import ListedPrompts, read_prompts

    if file:
        return ListedPrompts(Path(file).name, read_prompts(file, None))
    if recipe.data.source == "pictures":
        captions = look(recipe, lambda line: None).split.trained_captions()
        return ListedPrompts(recipe.data.source, tuple(captions))
    return open_source(recipe.data)
