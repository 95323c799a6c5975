"""Which sample stands at which place: arithmetic on (seed, place), so there is no position to save."""

from functools import lru_cache

import numpy as np

from dedistill.flow import keyed


@lru_cache(maxsize=8)
def _epoch(seed: int, purpose: str, epoch: int, count: int) -> np.ndarray:
    return keyed.permutation(seed, purpose, epoch, count)


def sample_indices(seed: int, purpose: str, places: np.ndarray, count: int) -> np.ndarray:
    """Dataset index in 0 ... count-1 for each place of the run, a fresh keyed permutation per epoch.

    places: int array, place = step * batch + position. Every sample comes once in ``count`` consecutive places.
    """
    epochs, rows = np.divmod(np.asarray(places, dtype=np.int64), count)
    found, which = np.unique(epochs, return_inverse=True)
    return np.stack([_epoch(seed, purpose, int(epoch), count) for epoch in found])[which, rows]
