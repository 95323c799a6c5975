"""Average the snapshots of a run: LERP chains, or power-law averages of any width; all of them in one pass over the files.

dedistill posthoc runs/digits/dedistill
dedistill posthoc runs/digits/dedistill --sigma-rel 0.075 0.15        # needs snapshot.ema in the recipe
"""

import argparse

from dedistill.cli.command import command_parser, finite, guarded, path, place, run_folder

SPACES = ("factors", "refactored", "delta", "merged")


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("posthoc", __doc__)
    parser.add_argument("run", type=place, help="folder of a run, or its recipe: snapshots/ is read, posthoc/ written")
    parser.add_argument(
        "--alpha", type=finite, nargs="+", help="weights of the newer snapshot, above 0 up to 1; default LibreFLUX's ten"
    )
    parser.add_argument("--sigma-rel", type=finite, nargs="+", help="widths of power-law averages, from the tracked ones")
    parser.add_argument("--step", type=int, help="as of this step, without the snapshots after it; default the last")
    parser.add_argument("--skip", type=int, nargs="+", default=[], metavar="STEP", help="snapshots to leave out")
    parser.add_argument(
        "--space", choices=SPACES, default="factors", help="what is averaged (docs/posthoc.md); default factors"
    )
    parser.add_argument("--out", type=path, help="output folder; default RUN/posthoc, RUN/posthoc_SPACE for delta and merged")
    args = parser.parse_args(argv)
    return guarded(lambda: run(args), debug=args.debug)


def run(args: argparse.Namespace) -> int:
    folder = run_folder(args.run)
    from dedistill.posthoc.average import average_run  # torch adds up: its sums are the same to the bit as before

    average_run(
        folder,
        alphas=args.alpha,
        widths=args.sigma_rel,
        step=args.step,
        skip=args.skip,
        space=args.space,
        out=args.out,
        say=lambda line: print(line, flush=True),
    )
    return 0
