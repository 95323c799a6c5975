"""Work done ahead of its use, while the caller is busy with the items before."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
TOGETHER = 4
"""Items made at a time: on busy cores it is waking the thread that costs, not the making."""


def ahead(items: Iterator[Item]) -> Iterator[Item]:
    """``items``, ``TOGETHER`` of them made by a thread while those before are in use. Errors come in their item's place."""
    with ThreadPoolExecutor(1, thread_name_prefix="data") as pool:
        coming, error = pool.submit(_make, items), None
        while error is None:
            made, error = coming.result()
            if not made and error is None:
                return
            coming = pool.submit(_make, items)
            yield from made
        raise error


def _make(items: Iterator[Item]) -> tuple[list[Item], Exception | None]:
    made = []
    try:
        made.extend(islice(items, TOGETHER))  # keeps what came before an error
    except Exception as e:
        return made, e
    return made, None
