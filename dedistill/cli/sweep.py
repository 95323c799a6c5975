"""Images and numbers of trained models over CFG scales, as one page that opens from the file system.

dedistill sweep dedistill:digits/dedistill                      # base, last snapshot, post-hoc averages
dedistill sweep dedistill:digits/teacher dedistill:digits/dedistill --candidates last
"""

import argparse
import sys

from dedistill.cli.command import guarded, of_sweep
from dedistill.errors import say


def main(argv: list[str] | None = None) -> int:
    parser = of_sweep("sweep", __doc__, "sweep", [1, 2, 3, 4, 5, 6, 8])
    args = parser.parse_args(argv)
    return guarded(lambda: run(args), debug=args.debug)


def run(args: argparse.Namespace) -> int:
    from dedistill.evaluation.prompts import ask

    asked = ask(args, say)  # before libraries are loaded, which takes seconds
    from dedistill.evaluation.candidates import clip_judge, open_compared, sweep_grid
    from dedistill.evaluation.sweep import sweep
    from dedistill.report.sweep import write_sweep_page

    compared = open_compared(args, asked, "sweep", say, steps=next(iter(args.steps), None))
    grid, title = sweep_grid(args, compared), f"CFG sweep: {compared.names}"
    sweep(compared.candidates, grid, compared.out, title=title, judge=compared.judge(), clip=clip_judge(args), say=say)
    print(f"done: {write_sweep_page(compared.out)}", file=sys.stderr)
    return 0
