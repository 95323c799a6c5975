"""Power-law averages rebuilt from one run against those that repetitions of it, with other widths in snapshot.ema, tracked.

python -m benchmarks.power_real RUN REPETITION ...
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks.interleave import RESULTS
from dedistill.posthoc.profiles import find_profiles, reconstruct
from dedistill.posthoc.snapshots import find_snapshots, write_averages

COUNTS = (4, 10, 20)
"""Snapshots of each width, evenly spaced to the end; the run needs as many as the last."""


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return sum(float((a[name].double() - b[name].double()).square().sum()) for name in a) ** 0.5


def main(run: Path, repetitions: list[Path]) -> None:
    newest = find_snapshots(run / "snapshots")[-1]
    last, tracked, rows = load_file(newest.path), {}, []
    for other in repetitions:
        same = load_file(other / "snapshots" / newest.path.name)
        assert all(torch.equal(same[name], last[name]) for name in last), f"'{other}' is another run"
        for sigma, found in find_profiles(other / "snapshots").items():
            tracked[sigma] = load_file(found[-1].path)
    for count in COUNTS:
        every, widths = newest.step // count, sorted(tracked)
        stored = {sigma: [s for s in found if s.step % every == 0] for sigma, found in find_profiles(run / "snapshots").items()}
        with tempfile.TemporaryDirectory() as folder:
            made = reconstruct(stored, widths, Path(folder), None)
            write_averages(made.snapshots, made.averages)
            for sigma, average, expected in zip(widths, made.averages, made.errors):
                error = distance(load_file(average.path), tracked[sigma]) / distance(tracked[sigma], last)
                row = {"snapshots": count, "sigma_rel": sigma, "error": f"{error:.1e}", "expected": f"{expected:.1e}"}
                rows.append(row)
                print(row)
    (RESULTS / "power_real.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(place) for place in sys.argv[2:]])
