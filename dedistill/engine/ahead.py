"""Work done one item ahead, while the caller is busy with the item before."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
_END = object()


def ahead(items: Iterator[Item]) -> Iterator[Item]:
    """``items``, each made by a thread while the one before is in use. Errors come where the item would have come."""
    with ThreadPoolExecutor(1, thread_name_prefix="data") as pool:
        coming = pool.submit(next, items, _END)
        while (item := coming.result()) is not _END:
            coming = pool.submit(next, items, _END)
            yield item
