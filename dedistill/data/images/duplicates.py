"""Which images of a data set are near-duplicates: one image resized, compressed, mirrored or cropped, or from a step aside."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from dedistill.data.images.likeness import MIRROR, Likeness

NEAR = 6
"""Of 64 bits of the hash of a whole: copies that were resized or compressed again differ in fewer, strangers in about 32."""
SAME_COLOURS = 16
"""Of 255, that the coarse colours of copies differ by on average, at most."""
MOST_CROPPED = 30_000
"""Images among which crops are looked for. The time grows with their square: 1.2 s for 5,000, 22 s for 20,000 on one core."""
NEAR_PLACE = 10
ENOUGH = ((6, 0.35), (16, 0.3))
"""Places that two images must share in one arrangement, and how much of width and height they must span in one of them: of a
crop, its whole content is in the other image; one thing alone may be in many."""
BAND = 16
"""Bits that two hashes of one place share with some luck: one place in several is found so."""
BUCKET, CROWDED = 64, 8
"""Places that share those bits with more others than these, or than so many times the mean, tell nothing apart."""
WINDOW = 1000
"""Hashes of a bucket that each is compared with, in order."""


def near_duplicates(images: Sequence[Likeness]) -> list[list[int]]:
    """Groups of images that are linked by steps of likeness, each sorted; by number of their first. Of any order the same ones.

    Time and memory grow with the number of images, not with that of pairs. Crops are looked for among ``MOST_CROPPED`` at most.
    """
    if not images:
        return []
    pairs = [_wholes(images)]
    if len(images) <= MOST_CROPPED:
        pairs.append(_crops(images))
    return linked(np.concatenate(pairs), len(images))


def linked(pairs: np.ndarray, count: int) -> list[list[int]]:
    """The connected ones of ``count`` numbers, given pairs [P, 2] of them; those that stand alone are left out."""
    graph = coo_array((np.ones(len(pairs), dtype=np.int8), pairs.T), shape=(count, count))
    groups = defaultdict(list)
    for i, label in enumerate(connected_components(graph, directed=False)[1]):
        groups[int(label)].append(i)
    return [group for group in groups.values() if len(group) > 1]


# --- the same whole ------------------------------------------------------------------------------------------------------


def _wholes(images: Sequence[Likeness]) -> np.ndarray:
    """Pairs [P, 2] of images whose wholes are alike, upright or mirrored, in shape and in colours."""
    count = len(images)
    whole = np.array([image.whole for image in images])
    colours = np.stack([image.colours for image in images]).astype(np.int16).reshape(count, 3, 3, 3)
    seen = near_pairs(np.concatenate([whole, whole ^ MIRROR]))
    seen = seen[seen.min(axis=1) < count]  # two mirrored ones are two upright ones
    mirrored = (seen >= count)[:, 0] | (seen >= count)[:, 1]
    first, second = (seen % count).T
    other = np.where(mirrored[:, None, None, None], colours[second][:, :, ::-1], colours[second])
    same = np.abs(colours[first] - other).mean((1, 2, 3)) <= SAME_COLOURS
    return np.stack([first, second], axis=1)[same & (first != second)]


def near_pairs(hashes: np.ndarray, distance: int = NEAR) -> np.ndarray:
    """Pairs [P, 2] of hashes [N] (uint64) that differ in at most ``distance`` bits; of equal ones, a chain through them all.

    Of distance + 2 bands of bits, two such hashes share at least two whole; only those that share two are compared, and of
    these each with its next ``WINDOW`` by value.
    """
    unique, which = np.unique(hashes, return_inverse=True)
    order = np.argsort(which, kind="stable")
    equal = which[order[1:]] == which[order[:-1]]
    found = [np.stack([order[:-1][equal], order[1:][equal]], axis=1)]
    one = np.zeros(len(unique), dtype=np.int64)
    one[which[::-1]] = np.arange(len(hashes))[::-1]  # the first of each value
    edges = np.linspace(0, 64, distance + 3).round().astype(int)
    bands = [sum(1 << bit for bit in range(low, high)) for low, high in pairwise(edges)]
    for a, b in combinations(bands, 2):
        for first, second in _sharing(unique & np.uint64(a | b), WINDOW):
            near = np.bitwise_count(unique[first] ^ unique[second]) <= distance
            found.append(np.stack([one[first[near]], one[second[near]]], axis=1))
    return np.unique(np.sort(np.concatenate(found), axis=1), axis=0)


def _sharing(keys: np.ndarray, window: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of numbers whose keys [N] are equal: of each, its next ``window`` in order."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    starts = np.arange(len(keys))
    for step in range(1, min(window, len(keys) - 1) + 1):
        starts = starts[starts + step < len(keys)]
        starts = starts[ordered[starts] == ordered[starts + step]]
        if not len(starts):
            break
        yield order[starts], order[starts + step]


# --- crops of one image --------------------------------------------------------------------------------------------------


def _crops(images: Sequence[Likeness]) -> np.ndarray:
    """Pairs [P, 2] of images that show the same places in one arrangement, upright or mirrored."""
    count = len(images)
    owner = np.repeat(np.arange(count), [len(image.hashes) for image in images])
    hashes = np.concatenate([image.hashes for image in images])
    hashes, owner = np.concatenate([hashes, hashes ^ MIRROR]), np.concatenate([owner, owner + count])
    hits = [np.empty(0, dtype=np.int64)]
    most = max(BUCKET, CROWDED * len(hashes) >> BAND)
    for band in range(64 // BAND):
        keys = (hashes >> np.uint64(BAND * band)) & np.uint64((1 << BAND) - 1)
        rare = np.flatnonzero(np.bincount(keys.astype(np.int64), minlength=1 << BAND)[keys.astype(np.int64)] <= most)
        for first, second in _sharing(keys[rare], most):
            first, second = rare[first], rare[second]
            near = np.bitwise_count(hashes[first] ^ hashes[second]) <= NEAR_PLACE
            a, b = np.sort(np.stack([owner[first[near]], owner[second[near]]]), axis=0)
            there = (a < count) & (a != b % count)
            hits.append(a[there] * 2 * count + b[there])
    codes, shared = np.unique(np.concatenate(hits), return_counts=True)
    pairs = [(int(code // (2 * count)), int(code % (2 * count))) for code in codes[shared >= 2]]
    alike = [(a, b % count) for a, b in pairs if _overlap(images[a], images[b % count], mirrored=b >= count)]
    return np.array(alike, dtype=np.int64).reshape(-1, 2)


def _overlap(one: Likeness, other: Likeness, *, mirrored: bool) -> bool:
    """Whether places of two images match in one arrangement: one shift and scale carries them from one to the other."""
    other_hashes = other.hashes ^ MIRROR if mirrored else other.hashes
    i, j = np.nonzero(np.bitwise_count(one.hashes[:, None] ^ other_hashes[None]) <= NEAR_PLACE)
    if len(i) < ENOUGH[0][0]:
        return False
    a, b = one.places[i], other.places[j] * [-1 if mirrored else 1, 1, 1]
    growth = b[:, 2] / a[:, 2]
    # each match says where all places of the first image lie in the second
    expected = b[:, None, :2] + growth[:, None, None] * (a[None, :, :2] - a[:, None, :2])
    agree = np.hypot(*(expected - b[None, :, :2]).transpose(2, 0, 1)) < 0.08
    agree &= np.abs(np.log(growth[:, None] / growth[None])) < 0.25
    best = agree[agree.sum(1).argmax()]
    shared = min(len(np.unique(i[best])), len(np.unique(j[best])))
    spans = [np.ptp(image.places[k[best], :2], axis=0) / image.sides for image, k in ((one, i), (other, j))]
    span = max(s.min() for s in spans)
    return any(shared >= places and span >= least for places, least in ENOUGH)
