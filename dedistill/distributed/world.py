"""The processes of one run, and the few words they exchange. With one process every exchange is the identity."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dedistill.distributed.outside import heartbeat
from dedistill.errors import RUN_AGAIN, UserError

PATIENCE = timedelta(hours=1)
"""How long ranks wait for one that still works, e.g. rank 0 at images. One that is gone is noticed at once."""
T = TypeVar("T")
GONE = "another process of this run has ended; its own message says why"
BUCKET = 2**26
"""Elements of gradients that travel in one piece: what summing costs in memory, for an adapter of any size."""


class World:
    """``rank`` of ``size`` processes. Gradients travel by the backend of the device they are on, words always by gloo:
    ranks that wait for rank 0 then never block a GPU, nor run into the short time limit of NCCL."""

    def __init__(self) -> None:
        """One process alone."""
        self.rank, self.size = 0, 1
        self._words: dist.ProcessGroup | None = None
        self.main = True
        """Whether this process is the one that writes and speaks."""
        self.engine = "ddp"
        """Name of the way in which the launcher wants work to be spread (dedistill.training.engine)."""
        self.requires_equal_forwards = False
        """Whether all ranks must run equally many passes through the network, or wait for each other for ever."""

    @classmethod
    def joined(cls) -> "World":
        """All processes of torch's process group, if there is one. Every rank must call this."""
        world = cls()
        if dist.is_initialized() and dist.get_world_size() > 1:
            world.rank, world.size = dist.get_rank(), dist.get_world_size()
            world.main = world.rank == 0
            world._words = dist.new_group(backend="gloo", timeout=PATIENCE)
        return world

    def gather(self, value: T) -> list[T]:
        """Every rank's ``value``, as JSON keeps it, in the order of ranks; the same list on all."""
        if self.size == 1:
            return [value]
        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        try:
            with heartbeat.during("waiting for other processes"):
                sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
                dist.all_gather(sizes, torch.tensor([len(own)]), group=self._words)
                longest = int(max(sizes))  # all_gather takes tensors of one length only
                received = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
                dist.all_gather(received, torch.nn.functional.pad(own, (0, longest - len(own))), group=self._words)
        except RuntimeError as e:
            raise UserError(GONE, RUN_AGAIN) from e
        return [json.loads(bytes(words[: int(size)].numpy())) for words, size in zip(received, sizes)]

    def broadcast_object(self, value: T) -> T:
        """The ``value`` of rank 0, on every rank."""
        return self.gather([value] if self.main else [])[0][0]

    @contextmanager
    def translate_dist_errors(self) -> Iterator[None]:
        """Around work in which torch exchanges things by itself. Raises UserError where another process has ended."""
        try:
            yield
        except RuntimeError as e:
            if isinstance(e, dist.DistError) or "gloo" in str(e).lower():
                raise UserError(GONE, RUN_AGAIN) from e
            raise

    def wait(self) -> None:
        """Go on when every rank has come here."""
        self.gather(None)

    def shutdown(self) -> None:
        """The last thing a process does with the others."""
        if self.size > 1:
            self.wait()
            dist.destroy_process_group()

    def assert_equal_on_all_ranks(self, facts: Mapping[str, object]) -> None:
        """Raises UserError, naming rank and fact, unless every rank says the same."""
        everyone = self.gather(facts)
        for rank, other in enumerate(everyone):
            if differing := sorted(key for key in facts.keys() | other.keys() if everyone[0].get(key) != other.get(key)):
                key = differing[0]
                raise UserError(
                    f"rank {rank} has another {key} than rank 0: {other.get(key)!r} against {everyone[0].get(key)!r}; "
                    "all processes of a run need the same recipe, files and hardware"
                )

    def all_reduce_(self, tensors: Sequence[Tensor]) -> None:
        """Add every rank's ``tensors`` up, in place, on all ranks. They travel in their own dtype, each element once."""
        if self.size == 1:
            return
        for bucket in _buckets(tensors):
            # one message for many small tensors: an adapter has hundreds, and each message costs its latency
            flat = torch.cat([t.flatten() for t in bucket])
            try:
                dist.all_reduce(flat)
            except RuntimeError as e:
                raise UserError(GONE, RUN_AGAIN) from e
            for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket])):
                tensor.copy_(part.view_as(tensor))


def _buckets(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """``tensors`` in runs of one dtype and at most about BUCKET elements."""
    buckets: list[list[Tensor]] = []
    for tensor in tensors:
        last = buckets[-1] if buckets else None
        if last and last[0].dtype == tensor.dtype and sum(t.numel() for t in last) + tensor.numel() <= BUCKET:
            last.append(tensor)
        else:
            buckets.append([tensor])
    return buckets


def partition_by_cost(costs: Sequence[int], size: int) -> list[list[int]]:
    """Which of the items with ``costs`` each of ``size`` ranks works on: even by cost, the same wherever it is computed.

    Longest first, each to the rank with the least so far (Graham 1969): at most 4/3 of the best possible maximum.
    Every rank keeps its items in order; ranks beyond the number of items get none.
    """
    loads = [0] * size  # ties go by count and rank, so that every process comes to the same partition
    dealt: list[list[int]] = [[] for _ in range(size)]
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = min(range(size), key=lambda r: (loads[r], len(dealt[r]), r))
        loads[rank] += costs[item]
        dealt[rank].append(item)
    return [sorted(items) for items in dealt]


def ceil_div(count: int, size: int) -> int:
    """The most that any of ``size`` ranks gets of ``count`` equal items."""
    return -(-count // size)
