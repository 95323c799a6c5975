"""How distilled models still are: loss, guidance, straightness, few steps and CFG, with intervals, as one page.

python tools/measure_distillation.py recipes/digits/dedistill.toml                  # base, last snapshot, averages
python tools/measure_distillation.py recipes/digits/{teacher,dedistill,student}.toml --candidates last
"""

import argparse
import sys
from functools import cache
from pathlib import Path

from dedistill.arguments import finite, positive
from dedistill.train import guarded


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="+", help="recipes whose finished runs are compared")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of every recipe")
    parser.add_argument(
        "--candidates", nargs="+", help="of each run: base, last, posthoc, or names of posthoc files; default all"
    )
    parser.add_argument("--reference", help="candidate that the others are compared with; default the first")
    parser.add_argument("--data", help="recipe for held-out samples and prompts; default the first that has data of its own")
    parser.add_argument("--samples", type=positive, default=512, help="held-out samples")
    parser.add_argument("--prompts", default="64", help="a number of prompts from the data, or a text file, one per line")
    parser.add_argument("--steps", type=positive, default=32, help="Euler steps of a path")
    parser.add_argument("--few", type=positive, nargs="+", default=[1, 2, 4, 8], help="few steps that are compared with it")
    parser.add_argument("--cfg", type=finite, nargs="+", default=[1, 2, 4, 8], help="guidance scales")
    parser.add_argument("--out", type=Path, help="output folder; default RUN/distillation of the last recipe")
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
    from dedistill.report.distillation import Questions, measure
    from dedistill.report.distillation_page import write_distillation_page
    from dedistill.sampling.judge import judge_for

    recipes = [load_recipe(path, args.set) for path in args.recipes]
    data = load_recipe(args.data, args.set) if args.data else next((r for r in recipes if r.data.source != "pairs"), recipes[0])
    if data.data.source == "pairs":
        raise UserError("no held-out data: these recipes train on stored pairs; name one that trains on data with --data", 2)
    several = len(recipes) > 1
    candidates = [c for r in recipes for c in candidates_of(r, args.candidates, prefix=several)]
    source = cache(lambda: open_data(data, sampling_device(), say).source)
    questions = Questions(
        recipe=data,
        source=source(),
        prompts=list(read_prompts(args.prompts, source)),
        judge=judge_for(source()),
        samples=args.samples,
        steps=args.steps,
        few=tuple(sorted(set(args.few))),
        cfgs=tuple(sorted(set(args.cfg))),
    )
    title = "How distilled still: " + ", ".join(r.run.name for r in recipes)
    found = measure(candidates, questions, reference=args.reference, title=title, say=say)
    page = write_distillation_page(args.out or Path(recipes[-1].run.out) / "distillation", found)
    print(f"done: {page}, and distillation.json beside it", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
