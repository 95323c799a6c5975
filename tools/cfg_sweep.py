"""Pictures and numbers of trained models over CFG scales, as one page that opens from the file system.

python tools/cfg_sweep.py recipes/digits/dedistill.toml                      # base, last snapshot, post-hoc averages
python tools/cfg_sweep.py recipes/digits/teacher.toml recipes/digits/dedistill.toml --candidates last
"""

import argparse
import sys

from dedistill.arguments import finite, of_candidates, positive, whole
from dedistill.train import guarded


def main() -> int:
    parser = of_candidates(__doc__.splitlines()[0], "sweep")
    parser.add_argument("--cfg", type=finite, nargs="+", default=[1, 2, 3, 4, 5, 6, 8], help="guidance scales")
    parser.add_argument("--skip", type=whole, nargs="+", default=[0], help="first steps without guidance")
    parser.add_argument("--steps", type=positive, nargs="+", default=[], help="Euler steps; default each recipe's sample.steps")
    parser.add_argument("--seeds", type=whole, nargs="+", default=[0], help="seeds of the starting noise")
    args = parser.parse_args()
    return guarded(lambda: run(args), debug=args.debug)


def run(args: argparse.Namespace) -> int:
    from dedistill.quiet import quiet_dependencies

    quiet_dependencies()
    from dedistill.candidates import compared
    from dedistill.report.console import say
    from dedistill.report.sweep_page import write_sweep_page
    from dedistill.sampling.sweep import Grid, sweep

    asked = compared(args, "sweep", say, steps=next(iter(args.steps), None))
    cfgs, skips, seeds, steps = (tuple(dict.fromkeys(values)) for values in (args.cfg, args.skip, args.seeds, args.steps))
    grid = Grid(cfgs, skips, asked.prompts, seeds, steps)
    sweep(asked.candidates, grid, asked.out, title=f"CFG sweep: {asked.names}", judge=asked.judge(), say=say)
    print(f"done: {write_sweep_page(asked.out)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
