"""What keyed randomness costs: noise and sigma of a step, against unkeyed torch.randn and torch.rand.

python -m benchmarks.draws
"""

import numpy as np
import torch

from benchmarks.interleave import ratio, report
from dedistill.flow import keyed
from dedistill.flow.path import DENSITIES, probabilities


def sigmas(batch: int) -> np.ndarray:
    return DENSITIES["beta"](probabilities(0, "sigma", 1, batch, stratify=True), alpha=2.0, beta=2.0)


def main() -> None:
    torch.set_num_threads(1)
    rows = {}
    for batch, shape in ((64, (1, 8, 16)), (16, (16, 128, 128))):
        ours = lambda: (  # noqa: E731
            keyed.noise(0, "noise", 1, range(batch), shape),  # noqa: B023
            sigmas(batch),  # noqa: B023
        )
        theirs = lambda: (torch.randn(batch, *shape), torch.distributions.Beta(2.0, 2.0).sample((batch,)))  # noqa: B023, E731
        rows[f"batch {batch} of {'x'.join(map(str, shape))}"] = ratio(ours, theirs)
    assert np.isfinite(sigmas(8)).all()
    report("draws", rows, "unkeyed time over keyed time, one CPU thread; < 1: keyed draws cost more")


if __name__ == "__main__":
    main()
