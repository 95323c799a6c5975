"""Items made ahead: the same items, errors where they belong, and nothing left running."""

import threading
import time

import pytest

from dedistill.errors import UserError
from dedistill.training.trainer import TOGETHER, ahead


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("data")]


def made(count: int, seen: list[int], fail_at: int | None = None):
    for i in range(count):
        if i == fail_at:
            raise UserError(f"sample {i} is bad")
        seen.append(i)
        yield i


@pytest.mark.parametrize("count", [0, 1, 4, 5, 8, 9])
def test_the_same_items_in_the_same_order(count):
    assert list(ahead(made(count, []))) == list(range(count)) and threads() == []


def test_it_is_so_far_ahead_and_no_further():
    seen = []
    items = ahead(made(30, seen))
    for i in range(20):
        assert next(items) == i
        time.sleep(0.02)
        assert seen == list(range((i // TOGETHER + 2) * TOGETHER)[:30])
    items.close()


@pytest.mark.parametrize("at", [0, 1, 4, 6])
def test_an_error_comes_where_its_item_would_have_come(at):
    got, seen = [], []
    items = ahead(made(9, seen, fail_at=at))
    with pytest.raises(UserError, match=f"sample {at} is bad"):
        for item in items:
            time.sleep(0.01)  # the bad one is made meanwhile, and must wait for its turn
            got.append(item)
    assert got == list(range(at)) and threads() == []
    assert next(items, None) is None


def test_closing_leaves_no_thread_and_makes_nothing_more():
    for taken in range(3):
        seen = []
        items = ahead(made(100, seen))
        for _ in range(taken):
            next(items)
        items.close()
        time.sleep(0.01)
        assert threads() == [] and len(seen) <= 2 * TOGETHER


def test_an_error_of_the_consumer_leaves_no_thread():
    items = ahead(made(100, []))
    with pytest.raises(ZeroDivisionError):
        try:
            for _ in items:
                1 / 0  # noqa: B018
        finally:
            items.close()
    assert threads() == []
