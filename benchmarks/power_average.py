"""Power-law averages: how near a rebuilt one is to the tracked one, and what tracking two of them costs a step.

The walk is one of 256 numbers over 4,000 steps; averages of sigma_rel .05 and .10 are stored K times at equal distances, and
those of other widths at the end are rebuilt from them. Errors are relative to the distance from average to last weights.

python -m benchmarks.power_average        a minute
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.interleave import RESULTS
from benchmarks.processes import step_of, trainer
from dedistill.posthoc.profiles import Profile, coefficients, exponent, share_of_new, walk_error
from dedistill.training.keeping import Averages

STEPS, STORED = 4000, (0.05, 0.10)
WIDTHS, COUNTS = (0.02, 0.03, 0.04, 0.075, 0.15, 0.20, 0.25), (4, 8, 16, 32)


def tracked(walk: np.ndarray, sigma: float) -> dict[int, np.ndarray]:
    """The average after every step."""
    mean, found = np.zeros(walk.shape[1]), {}
    for step in range(1, len(walk) + 1):
        mean = mean + share_of_new(exponent(sigma), step - 1, step) * (walk[step - 1] - mean)
        found[step] = mean
    return found


def rebuilt() -> list[dict]:
    walk = np.cumsum(np.random.default_rng(0).standard_normal((STEPS, 256)), axis=0)
    averages = {sigma: tracked(walk, sigma) for sigma in (*STORED, *WIDTHS)}
    rows = []
    for count in COUNTS:
        places = [(sigma, STEPS * k // count) for sigma in STORED for k in range(1, count + 1)]
        profiles = [Profile(step, exponent(sigma)) for sigma, step in places]
        for width in WIDTHS:
            target = Profile(STEPS, exponent(width))
            weights = coefficients(profiles, target)
            found = sum(w * averages[sigma][step] for w, (sigma, step) in zip(weights, places))
            direct = averages[width][STEPS]
            error = float(np.linalg.norm(found - direct) / np.linalg.norm(direct - walk[-1]))
            expected = walk_error(weights, profiles, target)
            rows.append({"snapshots": count, "sigma_rel": width, "error": f"{error:.1e}", "expected": f"{expected:.1e}"})
    return rows


def cost(batch: int) -> dict:
    """CPU seconds of an update over those of a training step, of the digits' teacher, all of whose weights are trained."""
    with tempfile.TemporaryDirectory() as folder:
        made = trainer(Path(folder), f"train.batch={batch}")
        train, averages, steps, updates = step_of(made), Averages(STORED, made.engine.trainable), [], []
        for step in range(23):
            steps.append(_seconds(train))
            updates.append(_seconds(lambda step=step: averages.update(step + 1)))
        share = statistics.median(updates[3:]) / statistics.median(steps[3:])
        return {"share_of_a_step": round(share, 4), "trained_numbers": sum(p.numel() for p in made.engine.trainable.values())}


def _seconds(action: Callable[[], object]) -> float:
    """Of this process's CPU time, which other work on the machine does not lengthen much."""
    start = time.process_time()
    action()
    return time.process_time() - start


def main() -> None:
    torch.set_num_threads(1)
    told = {"random_walk": rebuilt(), "tracking": {f"batch {b}": cost(b) for b in (16, 64)}}
    for row in told["random_walk"]:
        print(row)
    print(told["tracking"])
    (RESULTS / "power_average.json").write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
