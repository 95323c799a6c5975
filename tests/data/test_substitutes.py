"""Quarantined samples are not drawn; everything else stays where it is."""

import pytest
import torch

from dedistill.data.digits import load_digits
from dedistill.data.source import QuarantineSource, Slot
from dedistill.errors import UserError

BATCH, STEPS = 8, 40


@pytest.fixture(scope="module")
def digits():
    return load_digits(0.2)


def drawn(source, step: int, **options) -> dict[int, tuple]:
    """Position -> (name, caption, pixels), drawn in two parts."""
    found = {}
    slots = source.slots(3, step, BATCH, **options)
    for half in (slice(0, None, 2), slice(1, None, 2)):
        batch = source.draw(slots[half])
        found |= zip(range(BATCH)[half], zip([s.name for s in slots[half]], batch.captions, batch.latents, strict=True))
    return found


def same(a: tuple, b: tuple) -> bool:
    return a[:2] == b[:2] and torch.equal(a[2], b[2])


def test_without_a_quarantine_nothing_changes(digits):
    for step in (0, 7):
        a, b = drawn(digits, step), drawn(QuarantineSource(digits, {}), step)
        assert sorted(a) == sorted(b) == list(range(BATCH)) and all(same(a[p], b[p]) for p in a)


def test_others_stand_in_and_nothing_else_moves(digits):
    """A function of (seed, step, position, quarantine): the same whoever asks, from the step on that it stands there."""
    out = {drawn(digits, step)[p][0]: since for step, p, since in ((5, 2, 5), (5, 6, 5), (9, 0, 5), (4, 1, 6))}
    source, again = QuarantineSource(digits, out), QuarantineSource(digits, dict(out))
    replaced = set()
    for step in range(STEPS):
        plain, found, other = drawn(digits, step), drawn(source, step), drawn(again, step)
        assert sorted(found) == list(range(BATCH)) and all(same(found[p], other[p]) for p in found)
        for p in range(BATCH):
            if plain[p][0] in out and step >= out[plain[p][0]]:
                replaced.add((step, p))
                assert found[p][0] not in out
            else:
                assert same(plain[p], found[p])
    assert replaced >= {(5, 2), (5, 6), (9, 0)} and (4, 1) not in replaced


def test_held_out_samples_stay(digits):
    name = drawn(digits, 0, held_out=True)[0][0]
    assert drawn(QuarantineSource(digits, {name: 0}), 0, held_out=True)[0][0] == name


def test_too_few_others_is_an_error(digits):
    class Few:
        """Two samples in all."""

        name, image, draw, prompts = "few", None, None, None

        def slots(self, seed, step, batch, *, held_out=False):
            return [Slot(f"n{(seed + p) % 2}", (p,)) for p in range(batch)]

    with pytest.raises(UserError, match="quarantined samples only"):
        QuarantineSource(Few(), {"n0": 0, "n1": 0}).slots(0, 0, 4)
