"""How distilled models still are: loss, guidance, straightness, few steps and CFG, with intervals, as one page.

dedistill measure dedistill:digits/dedistill                  # base, last snapshot, averages
dedistill measure dedistill:digits/{teacher,dedistill,student} --candidates last
dedistill measure my_recipe.toml --folds 5        # after dedistill train my_recipe.toml --set 'data.fold=[1, 5]', [2, 5] ...
"""

import argparse
import sys
from pathlib import Path

from dedistill.cli.command import SOLVERS, finite, guarded, of_candidates, positive
from dedistill.errors import UserError, say


def main(argv: list[str] | None = None) -> int:
    parser = of_candidates("measure", __doc__, "distillation")
    parser.add_argument("--reference", help="candidate that the others are compared with; default the first")
    parser.add_argument("--samples", type=positive, default=512, help="number of held-out samples")
    parser.add_argument("--solver", choices=SOLVERS, help="of paths; default the sample.solver of the data's recipe")
    parser.add_argument("--steps", type=positive, default=32, help="its steps")
    parser.add_argument("--few", type=positive, nargs="+", default=[1, 2, 4, 8], help="few steps that are compared with it")
    parser.add_argument("--cfg", type=finite, nargs="+", default=[1, 2, 4, 8], help="guidance scales")
    parser.add_argument("--folds", type=positive, metavar="K", help="pool the K runs of data.fold = [1, K] to [K, K]")
    args = parser.parse_args(argv)
    if args.folds and (args.folds < 2 or len(args.recipes) > 1 or args.data):
        parser.error("--folds takes at least 2, one recipe, and no --data")
    if wrong := [str(n) for n in args.few if n >= args.steps]:
        parser.error(f"argument --few: {', '.join(wrong)} steps are no fewer than --steps {args.steps}")
    return guarded(lambda: run_folds(args) if args.folds else run(args), debug=args.debug)


def run_folds(args: argparse.Namespace) -> int:
    from dedistill.evaluation.prompts import ask

    quiet = argparse.Namespace(**vars(args) | {"prompts": "1"})
    plain = ask(quiet, lambda line: None).recipes[0]
    out = args.out or Path(plain.run.out) / "distillation"
    from dedistill.evaluation.candidates import open_compared
    from dedistill.evaluation.distillation import BINS
    from dedistill.evaluation.folds import arguments_of_folds, fold_of, measure_folds
    from dedistill.io.ownership import claim
    from dedistill.report.distillation import write_distillation_page

    claim(out, "distillation", "--out")
    folds = []
    for k, own in enumerate(arguments_of_folds(quiet), 1):
        try:
            opened = open_compared(own, ask(own, lambda line: None), "distillation", say)
        except UserError as e:
            train = f"dedistill train {args.recipes[0]} --set 'data.fold=[{k}, {args.folds}]'"
            raise UserError(f"fold {k} of {args.folds}: {e}\n  its run: {train}", e.exit_code) from e
        folds.append(fold_of(opened, max(2 * BINS, -(-args.samples // args.folds))))
    title = f"How distilled still, over {args.folds} folds: {plain.run.name}"
    found = measure_folds(folds, reference=args.reference, title=title, results=out / "answers", say=say)
    page = write_distillation_page(out, found)
    print(f"done: {page}, and distillation.json beside it", file=sys.stderr)
    return 0


def run(args: argparse.Namespace) -> int:
    from dedistill.evaluation.prompts import ask

    asked = ask(args, say)  # before libraries are loaded, which takes seconds
    from dedistill.evaluation.candidates import open_compared
    from dedistill.evaluation.distillation import EvalSettings, measure
    from dedistill.report.distillation import write_distillation_page

    compared = open_compared(args, asked, "distillation", say)
    settings = EvalSettings(
        recipe=compared.data,
        source=compared.held_out(),
        prompts=list(compared.prompts.texts),
        trained=compared.prompts.trained,
        judge=compared.judge(),
        samples=args.samples,
        steps=args.steps,
        few=tuple(sorted(set(args.few))),
        cfgs=tuple(sorted(set(args.cfg))),
        solver=args.solver or compared.data.sample.solver,
    )
    title = f"How distilled still: {compared.names}"
    found = measure(
        compared.candidates, settings, reference=args.reference, title=title, results=compared.out / "answers", say=say
    )
    page = write_distillation_page(compared.out, found)
    print(f"done: {page}, and distillation.json beside it", file=sys.stderr)
    return 0
