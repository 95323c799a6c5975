"""Work beside training: what is read ahead of its use, and what is written while training goes on."""

from collections.abc import Callable, Collection, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

from dedistill.distributed.heartbeat import heartbeat

# --- work done ahead of its use, while the caller is busy with the items before --------------------------------------


Item = TypeVar("Item")
TOGETHER = 4
"""Items made at a time: on busy cores it is waking the thread that costs, not the making."""


def ahead(items: Iterator[Item]) -> Generator[Item, None, None]:
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
    made: list[Item] = []
    try:
        made.extend(islice(items, TOGETHER))  # keeps what came before an error
    except Exception as e:
        return made, e
    return made, None


# --- saving beside training ------------------------------------------------------------------------------------------


Groups = dict[str, dict[str, Tensor]]
"""Name of a file -> its tensors by name."""


class AsyncCheckpointWriter:
    """One save at a time. What goes wrong in one is raised by the next call of ``start`` or ``wait``.

    The memory of the copies is kept from save to save: to be given new memory takes longer than to copy into it.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._running: Future[object] | None = None
        self._copies: dict[tuple[str, str], Tensor] = {}

    def start(self, groups: Groups, save: Callable[[Groups], object], *, no_copy: Collection[str] = ()) -> None:
        """Run ``save`` on copies of ``groups`` on the CPU, beside what follows, after the save before has ended.

        no_copy: names of groups that need no copy, because they are nobody else's.
        """
        self.wait()
        copies = {g: ts if g in no_copy else {n: self._copy(g, n, t) for n, t in ts.items()} for g, ts in groups.items()}
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # copies into pinned memory do not wait by themselves
        self._running = self._pool.submit(save, copies)

    def _copy(self, group: str, name: str, tensor: Tensor) -> Tensor:
        own = self._copies.get((group, name))
        if own is None or own.shape != tensor.shape or own.dtype != tensor.dtype:
            own = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._copies[group, name] = own
        return own.copy_(tensor, non_blocking=True)

    def check(self) -> None:
        """Raise what a save that has ended has raised; waits for none."""
        if self._running and self._running.done():
            self.wait()

    def wait(self) -> None:
        """Until what was started is safe on disk."""
        running, self._running = self._running, None
        if running:
            with heartbeat.during("saving"):
                running.result()

    def close(self) -> None:
        """Wait, and raise nothing: for the end of a run that has failed already."""
        self._pool.shutdown()
