"""Average the snapshots of a run: one LERP chain per alpha, all in one pass over the files.

python tools/posthoc_ema.py runs/digits/dedistill
"""

import argparse
import sys
from pathlib import Path

from dedistill.arguments import finite
from dedistill.train import guarded


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="run directory (its snapshots/ are read, posthoc/ is written)")
    parser.add_argument("--alpha", type=finite, nargs="+", help="weights of the newer checkpoint; default the ten of LibreFLUX")
    parser.add_argument("--out", type=Path, help="output folder; default RUN/posthoc")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args()
    return guarded(lambda: run(args), debug=args.debug)


def run(args: argparse.Namespace) -> int:
    from dedistill.posthoc.lerp import ALPHAS, chain_weights, describe, find_snapshots, lerp_snapshots, output_name

    snapshots = find_snapshots(args.run / "snapshots")
    steps = [s.step for s in snapshots]
    alphas = list({output_name(alpha): alpha for alpha in args.alpha or ALPHAS}.values())  # one average per file
    files = lerp_snapshots(snapshots, alphas, args.out or args.run / "posthoc")
    print(f"{len(snapshots)} snapshots, steps {steps[0]} to {steps[-1]}")
    print(f"{'alpha':>6} {'effective':>10} {'mean age':>9}  weights, newest first")
    for alpha in alphas:
        weights = chain_weights(alpha, len(steps))
        size, age = describe(weights, steps)
        shown = "  ".join(f"{s}:{w:.3f}" for s, w in zip(steps[::-1], weights[::-1]) if w >= 0.0005)
        print(f"{alpha:6g} {size:10.2f} {age:9.1f}  {shown}")
    print(f"{len(files)} averages in {files[0].parent}/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
