"""What a step allocates, moves and computes, storage by storage and kernel by kernel, on any device and on none ("meta")."""

import weakref
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten

BASE, TRAINED, GRADIENTS = "base", "trained weights", "gradients"
OPTIMIZER, AVERAGES, DEQUANTIZED = "optimizer", "averages", "dequantized weights"
ACTIVATIONS, TEMPORARY, GATHERED = "activations", "temporary", "gathered blocks"
CATEGORIES = (BASE, GATHERED, TRAINED, GRADIENTS, OPTIMIZER, AVERAGES, ACTIVATIONS, DEQUANTIZED, TEMPORARY)
_SCALED = aten.mul.Tensor
_CONVERTED = aten._to_copy.default
_FLASH_BACKWARD = aten._scaled_dot_product_flash_attention_backward.default
"""Adds the gradient of the queries up in float32, in memory of its own."""
_CPU_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
PRODUCTS = ("_int_mm", "_scaled_mm", "scaled_product")
"""Of codes, int8 or fp8."""
FREE = frozenset(
    [
        *("detach", "alias", "view", "_unsafe_view", "reshape", "t", "transpose", "permute", "expand", "lift_fresh", "slice"),
        *("split", "split_with_sizes", "unbind", "select", "unsqueeze", "squeeze", "as_strided", "_reshape_alias", "empty"),
        *("empty_like", "empty_strided", "new_empty", "new_empty_strided", "_local_scalar_dense", "is_same_size", "sym_size"),
    ]
)
"""Operations that start no kernel."""


@dataclass
class Work:
    """Of one phase of a step."""

    kernels: int = 0
    bytes: int = 0
    """Read and written by kernels, each tensor once per kernel."""
    moved: int = 0
    """Those of them that kernels without a matrix product move."""
    flops: int = 0
    integer: int = 0
    """Operations of int8 products."""
    fp8: int = 0
    """And of fp8 products."""
    copied: int = 0
    """Bytes that come from the memory of the CPU."""

    @property
    def operations(self) -> int:
        """Of all kinds."""
        return self.flops + self.integer + self.fp8

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(vars(self).values(), vars(other).values())))

    def __sub__(self, other: "Work") -> "Work":
        return self + other * -1

    def __mul__(self, times: int) -> "Work":
        return Work(*(times * n for n in vars(self).values()))


@dataclass
class Peak:
    """The largest amount of memory in use at once, in all or in one place."""

    bytes: int
    by_category: dict[str, int]


@dataclass(frozen=True)
class Event:
    """A storage is taken, or given back."""

    storage: int
    bytes: int
    """Below zero: given back."""
    phase: str
    place: str
    """Within the phase, e.g. a block of the network."""


class Meter(TorchDispatchMode):
    """While it is on, storages of ``device`` are followed from their making to their end, and kernels are counted.

    granule: what sizes are rounded up to, as the allocator does. What ``phase`` and ``place`` are called is the caller's.
    """

    def __init__(self, device: str, granule: int = 1, *, converts: bool = False):
        """converts: operands of another type are converted in memory of their own, as the CPU's kernels do."""
        super().__init__()
        self.device, self.granule, self.converts = device, granule, converts
        self.phase = self.place = ""
        self.events: list[Event] = []
        self.kinds: dict[int, str] = {}
        """Storage -> its category; those of a forward pass are told apart by how long they live."""
        self.work: dict[str, Work] = defaultdict(Work)
        self._here: dict[int, tuple[int, weakref.ref[Any]]] = {}
        self._count = 0

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        made, given = self._tensors(out), self._tensors(args) + (self._tensors([*kwargs.values()]) if kwargs else [])
        if made or given:
            self._count_kernel(func, args, kwargs or {}, out, given, made)
            codes = _makes_weights(func, given)
            for tensor in made:
                self.follow(tensor, DEQUANTIZED if codes else TEMPORARY)
            if codes and self.converts and func is _SCALED:
                self.buffer(made[0].nbytes)
            if func is _CPU_BACKWARD:
                self.buffer(_scores_of_cpus(*args[1:3]))
            if func is _FLASH_BACKWARD:
                self.buffer(4 * made[0].numel())
        return out

    def _tensors(self, tree: object) -> list[Tensor]:
        """In it, or in tuples and lists within it."""
        if isinstance(tree, Tensor):
            return [tree] if tree.device.type == self.device else []
        return [t for part in tree for t in self._tensors(part)] if isinstance(tree, tuple | list) else []

    def _count_kernel(
        self,
        func: OpOverload,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: object,
        given: list[Tensor],
        made: list[Tensor],
    ) -> None:
        packet = func.overloadpacket
        if packet.__name__ in FREE or func.is_view:
            return
        # of lists that are changed in place, nothing is given back
        size = sum(t.numel() * t.element_size() for t in [*given, *(made or (given if out is None else ()))])
        codes = packet.__name__ in PRODUCTS
        flops = flop_registry[packet](*args, **kwargs, out_val=out) if packet in flop_registry and not codes else 0
        coded = 2 * given[0].numel() * given[1].shape[1] if codes else 0
        work = self.work[self.phase]
        work.kernels += 1
        work.bytes += size
        work.moved += 0 if flops or coded else size
        work.flops += flops
        if codes and given[0].dtype == torch.int8:
            work.integer += coded
        else:
            work.fp8 += coded

    def follow(self, tensor: Tensor, category: str) -> None:
        """Count the storage of ``tensor`` from now on, if it is not counted already."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        size = -(-storage.nbytes() // self.granule) * self.granule
        if address in self._here or not size:
            return
        self._count += 1
        key = self._count
        self.kinds[key] = category
        self.events.append(Event(key, size, self.phase, self.place))
        self._here[address] = (key, weakref.ref(storage, lambda _: self._end(address, key, size)))

    def buffer(self, size: int) -> None:
        """Count what a kernel takes for itself while it runs."""
        self._count += 1
        self.kinds[self._count] = TEMPORARY
        self.events += [Event(self._count, size, self.phase, self.place), Event(self._count, -size, self.phase, self.place)]

    def _end(self, address: int, key: int, size: int) -> None:
        self.events.append(Event(key, -size, self.phase, self.place))
        if self._here.get(address, (0,))[0] == key:
            del self._here[address]

    def name(self, tensors: Iterable[Tensor], category: str) -> None:
        """Say what storages that are followed already are."""
        for tensor in tensors:
            if found := self._here.get(tensor.untyped_storage()._cdata):
                self.kinds[found[0]] = category

    def peaks(self, forward: str) -> dict[tuple[str, str], Peak]:
        """Of each phase and place. forward: the phase whose storages are activations where they outlive it, else temporary."""
        ends = {event.storage: event.phase for event in self.events if event.bytes < 0}
        taken = (event for event in self.events if event.bytes > 0)
        kinds = {
            e.storage: ACTIVATIONS
            if self.kinds[e.storage] == TEMPORARY and e.phase == forward != ends.get(e.storage)
            else self.kinds[e.storage]
            for e in taken
        }
        found: dict[tuple[str, str], Peak] = {}
        live: Counter[str] = Counter()
        total = 0
        for event in self.events:
            live[kinds[event.storage]] += event.bytes
            total += event.bytes
            where = (event.phase, event.place)
            if where not in found or total > found[where].bytes:
                found[where] = Peak(total, {c: live[c] for c in CATEGORIES if live[c]})
        return found


def _makes_weights(func: OpOverload, given: list[Tensor]) -> bool:
    """Of codes."""
    from_codes = func in (_SCALED, _CONVERTED) and any(t.dtype in (torch.int8, torch.float8_e4m3fn) for t in given)
    return from_codes or func.overloadpacket.__name__ == "dequantize"


def _scores_of_cpus(query: Tensor, key: Tensor) -> int:
    """Bytes of scores and of their gradients that torch's kernel for CPUs has at once in the pass back: a part of them, in
    float32 and, below that, once more as they are multiplied; and of a sum for each row."""
    rows, columns = query.shape[-2], key.shape[-2]
    rows = min(rows, 256 if rows >= 768 else 64 if rows >= 192 else 32)
    again = query.element_size() if query.element_size() < 4 else 0
    return (2 * (4 + again) * min(columns, 512) + 4) * rows * torch.get_num_threads()


# --- what the caching allocator makes of it --------------------------------------------------------------------------

MIB = 1 << 20


def reserved(events: Iterable[Event]) -> int:
    """Most bytes that CUDA's caching allocator takes from the driver for ``events``: best fit in segments, which are split and
    joined again, as its documentation says; nothing is ever given back."""
    free: Mapping[bool, list[tuple[int, int, int]]] = {True: [], False: []}
    held: dict[int, tuple[bool, int, int, int]] = {}
    total = place = 0
    for event in events:
        key, size = event.storage, event.bytes
        if size < 0:
            small, own, start, segment = held.pop(key)
            pool = free[small]
            for other in [b for b in pool if b[2] == segment and (b[1] + b[0] == start or start + own == b[1])]:
                pool.remove(other)
                own, start = own + other[0], min(start, other[1])
            pool.append((own, start, segment))
            continue
        small = size <= MIB
        pool = free[small]
        block = min((b for b in pool if b[0] >= size), default=None)
        if block is None:
            made = 2 * MIB if small else 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
            total += made
            block = (made, place, place)
            place += 2 * made
        else:
            pool.remove(block)
        left = block[0] - size
        if left >= 512 if small else left > MIB:
            pool.append((left, block[1] + size, block[2]))
            block = (size, block[1], block[2])
        held[key] = (small, *block)
    return total
