"""Pictures and numbers of trained models over CFG scales, as one page that opens from the file system.

python tools/cfg_sweep.py recipes/digits/dedistill.toml                      # base, last snapshot, post-hoc averages
python tools/cfg_sweep.py recipes/digits/teacher.toml recipes/digits/dedistill.toml --candidates last
"""

import argparse
import sys
from functools import cache
from pathlib import Path

from dedistill.arguments import finite, positive, whole
from dedistill.train import guarded


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="+", help="recipes whose finished runs are compared")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of every recipe")
    parser.add_argument(
        "--candidates", nargs="+", help="of each run: base, last, posthoc, or names of posthoc files; default all"
    )
    parser.add_argument("--cfg", type=finite, nargs="+", default=[1, 2, 3, 4, 5, 6, 8], help="guidance scales")
    parser.add_argument("--skip", type=whole, nargs="+", default=[0], help="first steps without guidance")
    parser.add_argument("--steps", type=positive, help="Euler steps; default each recipe's sample.steps")
    parser.add_argument("--prompts", default="64", help="a number of prompts from the data, or a text file, one per line")
    parser.add_argument("--seeds", type=whole, nargs="+", default=[0], help="seeds of the starting noise")
    parser.add_argument(
        "--clip", type=Path, metavar="FOLDER", help="CLIPModel of transformers that scores pictures and prompts"
    )
    parser.add_argument("--real", type=Path, metavar="FOLDER", help="real pictures to compare with in CLIP's space")
    parser.add_argument("--out", type=Path, help="output folder; default RUN/sweep of the last recipe")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args()
    return guarded(lambda: run(args), debug=args.debug)


def run(args: argparse.Namespace) -> int:
    from dedistill.quiet import quiet_dependencies

    quiet_dependencies()
    from dedistill.candidates import candidates_of, read_prompts
    from dedistill.errors import UserError
    from dedistill.finished import sampling_device
    from dedistill.prepare import open_data
    from dedistill.recipe import load_recipe
    from dedistill.report.console import say
    from dedistill.report.sweep_page import write_sweep_page
    from dedistill.sampling.judge import judge_for
    from dedistill.sampling.judges import ClipJudge
    from dedistill.sampling.sweep import Grid, sweep

    if args.real and not args.clip:
        raise UserError("--real: CLIP compares with real pictures; name its folder with --clip", exit_code=2)
    recipes = [load_recipe(path, args.set) for path in args.recipes]
    first = next((r for r in recipes if r.data.source != "pairs"), recipes[0])
    source = cache(lambda: open_data(first, sampling_device(), say).source)
    several = len(recipes) > 1
    candidates = [c for r in recipes for c in candidates_of(r, args.candidates, steps=args.steps, prefix=several)]
    cfgs, skips, seeds = (tuple(dict.fromkeys(values)) for values in (args.cfg, args.skip, args.seeds))
    grid = Grid(cfgs, skips, read_prompts(args.prompts, source), seeds)
    out = args.out or Path(recipes[-1].run.out) / "sweep"
    title = "CFG sweep: " + ", ".join(r.run.name for r in recipes)
    judge = judge_for(None if first.data.source == "pictures" else source())
    clip = ClipJudge(args.clip, args.real, device=sampling_device()) if args.clip else None
    sweep(candidates, grid, out, title=title, judge=judge, clip=clip, say=say)
    print(f"done: {write_sweep_page(out)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
