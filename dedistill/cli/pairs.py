"""Store pairs (noise, caption, trajectory points) of a trained model, to distil or straighten it.

dedistill pairs dedistill:digits/teacher --out runs/digits/pairs --count 1536 --cfg 3 --steps 16 --points 4
"""

import argparse
import sys

from dedistill.cli.command import SOLVERS, finite, guarded, guider, path, positive, recipe_parser, whole
from dedistill.errors import amount, say


def main(argv: list[str] | None = None) -> int:
    parser = recipe_parser("pairs", __doc__, "recipe of the teacher; its finished run is used")
    parser.add_argument("--out", type=path, required=True, help="folder of the shards")
    parser.add_argument("--count", type=positive, default=1536, help="number of pairs")
    parser.add_argument("--cfg", type=finite, default=3.0, help="guidance scale baked into the pairs")
    parser.add_argument("--guider", type=guider, metavar="NAME", help="default the recipe's sample.guider")
    parser.add_argument("--solver", choices=SOLVERS, help="default the recipe's sample.solver")
    parser.add_argument("--steps", type=positive, default=16, help="its steps")
    parser.add_argument("--points", type=positive, default=4, help="intervals between stored states; must divide --steps")
    parser.add_argument("--seed", type=whole, default=0, help="seed of noise and prompts")
    parser.add_argument("--shard-size", type=positive, default=512, help="pairs per shard")
    args = parser.parse_args(argv)
    return guarded(lambda: run(args), debug=args.debug)


def run(args: argparse.Namespace) -> int:
    from dedistill.data.encode import open_data
    from dedistill.evaluation.prompts import say_repeated
    from dedistill.flow.guidance import guider_of
    from dedistill.recipe import load_recipe
    from dedistill.runs.model import open_finished, sampling_device
    from dedistill.sampling.pairs import make_pairs, teacher_hash
    from dedistill.sampling.sampler import Sampling

    recipe = load_recipe(args.recipe, args.set)
    model, guidance = open_finished(recipe), guider_of(args.guider or recipe.sample.guider, args.cfg)
    source = open_data(recipe, sampling_device(), say).source
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
        progress=lambda done, total: print(f"pairs {done}/{total}", file=sys.stderr, flush=True),
    )
    print(f"done: {amount(facts['count'], 'pair')} in {amount(len(facts['shards']), 'shard')}, {args.out}/", file=sys.stderr)
    return 0
