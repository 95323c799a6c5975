"""Mixing: shares hold, nobody is lost or repeated within an epoch, and a draw depends on its place alone."""

import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest

from dedistill.data.images.scan import caption_warnings
from dedistill.flow import keyed
from dedistill.flow.keyed import BLOCK, choose, draw_samples, sample_indices

MIXES = [([50, 70], [1, 1]), ([1000, 7, 300], [5, 4, 1]), ([10], [3.0]), ([40, 40, 40, 40], [0.7, 0.2, 0.099, 0.001])]


def test_half_and_half():
    """Two sources, or two captions of each image, come 50/50 within 1 %."""
    sources, _ = draw_samples(0, np.arange(10_000), [300, 5000], [0.5, 0.5])
    assert abs(np.mean(sources) - 0.5) < 0.001
    picks = choose(0, "caption", np.arange(40_000), np.full(40_000, 2))
    assert abs(np.mean(picks) - 0.5) < 0.01


@pytest.mark.parametrize(("counts", "weights"), MIXES)
@pytest.mark.parametrize("seed", [0, 1])
def test_shares_never_drift(counts, weights, seed):
    """After every block each source has its share of the draws within 4, however long the run: independent draws drift."""
    sources, _ = draw_samples(seed, np.arange(BLOCK * 800), counts, weights)
    shares = np.array(weights) / np.sum(weights)
    drawn = np.cumsum(sources[:, None] == np.arange(len(counts)), axis=0)[BLOCK - 1 :: BLOCK]
    wanted = BLOCK * np.arange(1, len(drawn) + 1)[:, None] * shares
    assert np.abs(drawn - wanted).max() <= 4
    per_block = np.diff(drawn, axis=0, prepend=0)
    assert np.abs(per_block - BLOCK * shares).max() <= 1


def test_order_within_a_block_is_random():
    """No position of a batch, and so no device, sees one source only."""
    sources, _ = draw_samples(0, np.arange(64_000), [50, 70], [1, 1])
    assert np.abs(sources.reshape(-1, 8).mean(axis=0) - 0.5).max() < 0.03
    assert abs(np.corrcoef(sources[:-1], sources[1:])[0, 1]) < 0.05


@pytest.mark.parametrize(("counts", "weights"), MIXES)
def test_each_source_walks_its_own_epochs(counts, weights):
    sources, indices = draw_samples(3, np.arange(5000), counts, weights)
    for source, count in enumerate(counts):
        walked = indices[sources == source]
        assert np.array_equal(walked, sample_indices(3, f"source{source}", np.arange(len(walked)), count))
        for start in range(0, len(walked) - count + 1, count):
            assert sorted(walked[start : start + count]) == list(range(count))


def test_a_draw_depends_on_its_place_alone():
    """Any order of calls, any batch size, any number of devices."""
    counts, weights = MIXES[1]
    whole = np.stack(draw_samples(0, np.arange(4000), counts, weights))
    shuffled = np.random.default_rng(0).permutation(4000)
    assert np.array_equal(np.stack(draw_samples(0, shuffled, counts, weights)), whole[:, shuffled])
    for places in (np.array([3999]), np.array([7, 7, 3000]), np.arange(100, 108)):
        assert np.array_equal(np.stack(draw_samples(0, places, counts, weights)), whole[:, places])
    assert not np.array_equal(np.stack(draw_samples(1, np.arange(4000), counts, weights)), whole)
    sizes = np.random.default_rng(1).integers(1, 6, 4000)
    picks = choose(0, "crop", np.arange(4000), sizes)
    assert np.array_equal(choose(0, "crop", shuffled, sizes[shuffled]), picks[shuffled])
    assert not np.array_equal(choose(0, "caption", np.arange(4000), sizes), picks)


def test_sample_indices_are_keyed_permutations():
    places = np.array([0, 5, 9, 10, 25, 10**6])
    by_hand = [keyed.generator(4, "p", int(p) // 10).permutation(10)[int(p) % 10] for p in places]
    assert sample_indices(4, "p", places, 10).tolist() == by_hand


def test_choices_are_uniform():
    for count in (1, 2, 3, 7):
        picks = choose(0, "caption", np.arange(30_000), np.full(30_000, count))
        shares = np.bincount(picks, minlength=count) / 30_000
        assert len(shares) == count and np.abs(shares - 1 / count).max() < 0.01


@pytest.mark.parametrize(
    ("counts", "weights", "message"),
    [
        ([], [], "0 weights for 0 sources"),
        ([1, 2], [1], "1 weights for 2 sources"),
        ([1, 2], [1, 0], "source 1 has weight 0"),
        ([1, 2], [-1, 1], "source 0 has weight -1"),
        ([1, 2], [1, float("nan")], "source 1 has weight nan"),
        ([1, 0], [1, 1], "source 1 has no sample"),
    ],
)
def test_wrong_mixes(counts, weights, message):
    with pytest.raises(ValueError, match=message):
        draw_samples(0, np.arange(4), counts, weights)


def test_images_without_a_short_or_a_long_caption():
    """At least one short and one long caption where there are two."""
    long, short = " ".join(["word"] * 21), " ".join(["word"] * 20)
    captions = {"both": (long, short), "long": (long, long + " more"), "short": (short, "a"), "one": (long,), "none": ("",)}
    samples = [SimpleNamespace(name=name, captions=found) for name, found in captions.items()]
    assert caption_warnings(samples) == [
        ("long", "no caption of at most 20 words"),
        ("short", "no caption of more than 20 words"),
    ]


def test_a_long_run_is_drawn_in_little_memory():
    tracemalloc.start()
    draw_samples(0, np.arange(10**6, 10**6 + 8), [1000, 70_000], [1, 3])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6
