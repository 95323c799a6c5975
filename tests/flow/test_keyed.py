"""Keyed draws: a name alone decides the bytes."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from dedistill.flow import keyed

SHAPE = (3, 4, 4)


def test_same_name_same_bytes():
    first = keyed.noise(3, "noise", 7, range(5), SHAPE)
    assert torch.equal(keyed.noise(3, "noise", 7, range(5), SHAPE), first)
    assert np.array_equal(keyed.uniforms(3, "u", 7, (4, 2)), keyed.uniforms(3, "u", 7, (4, 2)))
    assert np.array_equal(keyed.generator(3, "p", 7).permutation(50), keyed.generator(3, "p", 7).permutation(50))


NAMES = [(0, "noise", 1, 2), (1, "noise", 1, 2), (0, "other", 1, 2), (0, "noise", 2, 2), (0, "noise", 1, 3), (0, "noise", 2, 1)]
NAMES += [(2**32, "noise", 1, 2), (0, "noise", 12), (0, "noise", 1, 2**40)]  # more than 32 bits of seed and place count


def test_any_part_of_the_name_changes_all_numbers():
    rows = np.stack([keyed.generator(*name).standard_normal(64) for name in NAMES])
    assert len(np.unique(rows)) == rows.size
    assert np.abs(np.corrcoef(rows) - np.eye(len(NAMES))).max() < 0.5  # sd of a correlation of 64 pairs: 0.125


@pytest.mark.parametrize("positions", [[0], [5, 2], range(3, 8), np.array([7, 7, 0])], ids=str)
def test_any_slice_of_positions_is_the_slice_of_all(positions):
    """Slots may be shared out in any way."""
    everything = keyed.noise(0, "noise", 11, range(8), SHAPE)
    assert torch.equal(keyed.noise(0, "noise", 11, positions, SHAPE), everything[list(positions)])


def test_global_generators_are_left_alone():
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    keyed.noise(0, "noise", 0, range(4), SHAPE)
    keyed.uniforms(0, "u", 0, 4)
    keyed.generator(0, "p", 0).permutation(4)
    after = torch.get_rng_state(), np.random.get_state()[1], random.getstate()
    assert torch.equal(before[0], after[0]) and np.array_equal(before[1], after[1]) and before[2] == after[2]


def test_global_seeds_change_nothing():
    first = keyed.noise(0, "noise", 0, range(2), SHAPE)
    torch.manual_seed(99)
    np.random.seed(99)
    assert torch.equal(keyed.noise(0, "noise", 0, range(2), SHAPE), first)


def test_noise_is_standard_normal():
    x = keyed.noise(0, "noise", 0, range(512), (1, 8, 16)).numpy()
    assert x.shape == (512, 1, 8, 16) and x.dtype == np.float32
    n = x.size
    assert abs(x.mean()) < 4 / n**0.5 and abs(x.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs(stats.skew(x, axis=None)) < 4 * (6 / n) ** 0.5 and abs(stats.kurtosis(x, axis=None)) < 4 * (24 / n) ** 0.5
    assert stats.kstest(x.ravel(), "norm").statistic < 1.95 / n**0.5  # 1 in 1000


def test_samples_are_independent():
    x = keyed.noise(0, "noise", 0, range(64), (256,)).numpy()
    c = np.corrcoef(x)[np.triu_indices(64, 1)]
    assert abs(c.std() * 256**0.5 - 1) < 0.1 and np.abs(c).max() < 5 / 256**0.5


def test_uniforms_are_uniform_and_inside():
    u = keyed.uniforms(0, "u", 0, (1000, 100))
    assert u.shape == (1000, 100) and u.dtype == np.float64
    assert u.min() > 0 and u.max() < 1
    assert stats.kstest(u.ravel(), "uniform").statistic < 1.95 / u.size**0.5


@pytest.mark.parametrize(
    "raw",
    [0.0, 1 - 2.0**-53],
)
def test_uniforms_stay_inside_at_the_ends_of_the_generator(monkeypatch, raw):
    """A generator returns 0 ... 1 - 2^-53; u = 1 would also name an eleventh digit in a caption."""
    monkeypatch.setattr(keyed, "generator", lambda *name: SimpleNamespace(random=lambda shape: np.full(shape, raw)))
    u = keyed.uniforms(0, "u", 0, 2)
    assert u.min() > 0 and u.max() < 1


def test_permutations_are_permutations_and_differ():
    rows = np.stack([keyed.generator(0, "p", i).permutation(20) for i in range(500)])
    assert np.array_equal(np.sort(rows, 1), np.tile(np.arange(20), (500, 1)))
    assert len(np.unique(rows, axis=0)) == 500
    counts = np.stack([np.bincount(column, minlength=20) for column in rows.T])
    assert stats.chisquare(counts, axis=1).pvalue.min() > 1e-4  # every number comes to every place


GOLDEN = {
    "normal": [0.36806607, 0.98643982, -1.14391637, 0.04028447],
    "uniform": [0.1326986991235241, 0.09448620779215205, 0.6796643718030682],
    "permutation": [2, 4, 0, 6, 5, 3, 7, 1],
    "integers": [9, 2, 5, 2, 5, 7],
}


def test_golden_numbers():
    """A run is repeated from its seed: a library whose streams change breaks every stored run, and must be noticed."""
    normal = keyed.noise(0, "noise", 3, [5], (4,))
    torch.testing.assert_close(normal, torch.tensor([GOLDEN["normal"]]), rtol=0, atol=1e-6)
    np.testing.assert_allclose(keyed.uniforms(1, "sigma", 2, 3), GOLDEN["uniform"], rtol=0, atol=1e-15)
    assert keyed.generator(2, "sigma/strata", 9).permutation(8).tolist() == GOLDEN["permutation"]
    assert keyed.generator(0, "prompts").integers(10, size=6).tolist() == GOLDEN["integers"]
