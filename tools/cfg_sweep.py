"""Pictures and numbers of trained models over CFG scales, as one page that opens from the file system.

python tools/cfg_sweep.py recipes/digits/dedistill.toml                      # base, last snapshot, post-hoc averages
python tools/cfg_sweep.py recipes/digits/teacher.toml recipes/digits/dedistill.toml --candidates last
"""

import argparse
import sys

from dedistill.arguments import of_sweep
from dedistill.train import guarded


def main() -> int:
    parser = of_sweep(__doc__.splitlines()[0], "sweep", [1, 2, 3, 4, 5, 6, 8])
    args = parser.parse_args()
    return guarded(lambda: run(args), debug=args.debug)


def run(args: argparse.Namespace) -> int:
    from dedistill.quiet import quiet_dependencies

    quiet_dependencies()
    from dedistill.candidates import clip_judge, compared, sweep_grid
    from dedistill.report.console import say
    from dedistill.report.sweep_page import write_sweep_page
    from dedistill.sampling.sweep import sweep

    asked = compared(args, "sweep", say, steps=next(iter(args.steps), None))
    grid, title = sweep_grid(args, asked.prompts), f"CFG sweep: {asked.names}"
    sweep(asked.candidates, grid, asked.out, title=title, judge=asked.judge(), clip=clip_judge(args), say=say)
    print(f"done: {write_sweep_page(asked.out)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
