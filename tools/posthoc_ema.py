"""Average the snapshots of a run: LERP chains, or power-law averages of any width; all of them in one pass over the files.

python tools/posthoc_ema.py runs/digits/dedistill
python tools/posthoc_ema.py runs/digits/dedistill --sigma-rel 0.075 0.15        # needs snapshot.ema in the recipe
"""

import argparse
import sys
from pathlib import Path

from dedistill.arguments import finite
from dedistill.train import guarded

SPACES = ("factors", "refactored", "delta", "merged")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="run directory (its snapshots/ are read, posthoc/ is written)")
    parser.add_argument("--alpha", type=finite, nargs="+", help="weights of the newer checkpoint; default the ten of LibreFLUX")
    parser.add_argument("--sigma-rel", type=finite, nargs="+", help="widths of power-law averages, from the tracked ones")
    parser.add_argument("--step", type=int, help="as of this step, without the snapshots after it; default the last")
    parser.add_argument("--skip", type=int, nargs="+", default=[], metavar="STEP", help="snapshots to leave out")
    parser.add_argument(
        "--space", choices=SPACES, default="factors", help="what is averaged (docs/posthoc.md); default factors"
    )
    parser.add_argument("--out", type=Path, help="output folder; default RUN/posthoc, RUN/posthoc_SPACE for delta and merged")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args()
    return guarded(lambda: run(args), debug=args.debug)


def run(args: argparse.Namespace) -> int:
    from dedistill.quiet import quiet_dependencies

    quiet_dependencies()
    from dedistill.release.averaging import average_run

    average_run(
        args.run,
        alphas=args.alpha,
        widths=args.sigma_rel,
        step=args.step,
        skip=args.skip,
        space=args.space,
        out=args.out,
        say=lambda line: print(line, flush=True),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
