"""After a run: how distilled it still is, which weights to take, and at which CFG, skip and steps; with intervals and images.

dedistill evaluate dedistill:digits/dedistill
dedistill evaluate dedistill:digits/dedistill --cfg 1 1.5 2 3 --steps 8 16 --prompts 128
"""

import argparse
import sys

from dedistill.cli.command import guarded, of_sweep, positive
from dedistill.errors import say


def main(argv: list[str] | None = None) -> int:
    parser = of_sweep("evaluate", __doc__, "evaluation", [1, 1.5, 2, 3, 4, 6])
    parser.add_argument("--reference", help="candidate that the others are compared with; default the first")
    parser.add_argument("--by", help="number of scores.json to choose by; default the one that judges prompt adherence")
    parser.add_argument("--samples", type=positive, default=512, help="number of held-out samples")
    args = parser.parse_args(argv)
    return guarded(lambda: run(args), debug=args.debug)


def run(args: argparse.Namespace) -> int:
    from dedistill.data.split import LEAST_UNITS
    from dedistill.evaluation.prompts import ask

    asked = ask(args, say, least=LEAST_UNITS)  # before libraries are loaded, which takes seconds
    from dedistill.evaluation.candidates import clip_judge, open_compared, sweep_grid
    from dedistill.evaluation.distillation import EvalSettings
    from dedistill.evaluation.evaluate import evaluate
    from dedistill.report.evaluation import cautions, write_evaluation

    compared = open_compared(args, asked, "evaluation", say, steps=next(iter(args.steps), None))
    if args.candidates is None and not any(c.average for c in compared.candidates):
        print("no averages among the candidates; dedistill posthoc RUN makes them", file=sys.stderr)
    grid, clip = sweep_grid(args, compared), clip_judge(args)
    settings = EvalSettings(
        recipe=compared.data,
        source=compared.held_out(),
        prompts=list(compared.prompts.texts),
        trained=compared.prompts.trained,
        judge=compared.judge(),
        samples=args.samples,
        steps=32,
        few=(1, 2, 4, 8),
        cfgs=tuple(sorted({min(args.cfg), max(args.cfg)})),
        solver=next(iter(args.solver), compared.data.sample.solver),
    )
    options = {"names": compared.names, "by": args.by, "reference": args.reference, "clip": clip, "say": say}
    found = evaluate(compared.runs, settings, grid, compared.out, **options)
    answers, page = write_evaluation(compared.out, found, compared.names)
    print("".join(f"\n{words}\n" for words in cautions(found)), end="")
    print("\n".join(f"\n{item['question']} {item['answer']}" for item in answers))
    print(f"\ndone: {page}", file=sys.stderr)
    return 0
