"""A frozen network larger than the device: some of its blocks lie in the memory of the CPU, and come one ahead of their use.

Two rooms on the device, each of the largest such block's size, take turns: while one block computes, the next is copied by a
stream of its own. Nothing is copied back, since nothing of it changes. Numbers are those of a network that lies there whole.

A room is free as soon as another block is called: by then all work of the block before is queued. In a pass back, too, for
autograd goes from the last block to the first and calls each again before its gradients (gradient checkpointing, without
which gradients would read weights that are gone).
"""

import weakref
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

Copy = Callable[[Tensor, Tensor], Callable[[], None]]
"""Begins to copy the second's bytes into the first, on another device; what it returns has all later work wait for them."""
LEAST = 3
"""Fewer blocks save nothing, since two fit on the device at any time. Recipes say it, too."""
ALIGNED = 256
"""Bytes; kernels load several numbers at once."""
PORTABLE = 1
"""cudaHostRegisterPortable: for all of a process' contexts."""


def spread(count: int, among: int) -> list[int]:
    """``count`` of the numbers below ``among``, as evenly as can be: the blocks between give copies time."""
    return [(2 * i + 1) * among // (2 * count) for i in range(count)]


def saved(sizes: Sequence[int], count: int) -> int:
    """Bytes of the device that are free while ``count`` blocks of a network wait. sizes: bytes of each of its blocks."""
    waiting = [sizes[i] for i in spread(count, len(sizes))]
    return sum(waiting) - 2 * max(waiting, default=0)


def fewest(sizes: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """As few blocks as must wait for ``fits`` to be true of the bytes that this saves; None where all are not enough."""
    return next((count for count in (0, *range(LEAST, len(sizes) + 1)) if fits(saved(sizes, count))), None)


def without_room(blocks: Sequence[nn.Module], device: torch.device | str, needed: int) -> list[nn.Module]:
    """As few of ``blocks`` as must wait for ``device`` to hold ``needed`` bytes, of which all of ``blocks`` are a part; all of
    them where that is not enough, none on a CPU."""
    free, sizes = free_memory(device), [sum(p.nbytes for p in block.parameters()) for block in blocks]
    count = 0 if free is None else fewest(sizes, lambda less: needed - less <= free)
    return [blocks[i] for i in spread(len(blocks) if count is None else count, len(blocks))]


def free_memory(device: torch.device | str) -> int | None:
    """Bytes of ``device`` that torch may still take; None on a CPU, of which that is not known."""
    if torch.device(device).type != "cuda":
        return None
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def move_rest(denoiser: nn.Module, device: torch.device | str, waiting: Sequence[nn.Module]) -> None:
    """``denoiser`` to ``device``, but for the parameters of the blocks ``waiting``."""
    stay = {parameter for block in waiting for parameter in block.parameters()}
    denoiser._apply(lambda tensor: tensor if tensor in stay else tensor.to(device))


class Swap:
    """From now on the parameters of ``blocks`` lie in the memory of the CPU, and on ``device`` while they are used.

    They may be read at any time, and are where they are. blocks: in the order in which a pass calls them, frozen.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device | str, copy: Copy | None = None):
        """copy: by default one that suits the device."""
        device = torch.device(device)
        self.copy = copy or (CudaCopy(device) if device.type == "cuda" else copy_now)
        self.held = [_Held(block, pin=device.type == "cuda") for block in blocks]
        size = max(held.size for held in self.held)
        self.rooms = [_Room(torch.empty(size, dtype=torch.uint8, device=device)) for _ in range(2)]
        self.used = self.rooms[0]
        for i, block in enumerate(blocks):
            block.register_forward_pre_hook(partial(self._before, i))

    @property
    def facts(self) -> dict[str, int | bool]:
        """For plan.json: blocks, bytes of the CPU's memory and of the device's, and whether the device can read the former."""
        sizes = {"host_bytes": sum(held.size for held in self.held), "device_bytes": sum(len(r.buffer) for r in self.rooms)}
        return {"blocks": len(self.held), **sizes, "pinned": all(held.buffer.is_pinned() for held in self.held)}

    def _before(self, i: int, block: nn.Module, args: object) -> None:
        self.used = self._room(i)
        self.used.ready()
        self.held[i].lie_in(self.used.buffer)
        if (following := self._following(i)) is not None:
            self._room(following)

    def _room(self, i: int) -> "_Room":
        """Where block ``i`` is, or will be: the room that was not used last."""
        held = self.held[i]
        for room in self.rooms:
            if room.held is held:
                return room
        room = self.rooms[self.used is self.rooms[0]]
        if room.held:
            room.held.lie_in(room.held.buffer)
        room.held, room.ready = held, self.copy(room.buffer[: held.size], held.buffer)
        return room

    def _following(self, i: int) -> int | None:
        """The block that is called after ``i``; None at the turn, where the last two are called again."""
        # asked as torch's own checkpointing does: whether this call is part of a pass back
        if torch._C._current_graph_task_id() != -1:
            return i - 1 if i else None
        if i + 1 < len(self.held):
            return i + 1
        return None if torch.is_grad_enabled() else 0


class _Held:
    """The parameters of one block, end to end in a buffer of the CPU."""

    def __init__(self, block: nn.Module, *, pin: bool):
        self.parameters = list(block.parameters())
        self.starts, self.size = [], 0
        for parameter in self.parameters:
            self.starts.append(self.size)
            self.size += -(-parameter.numel() * parameter.element_size() // ALIGNED) * ALIGNED
        self.buffer = torch.empty(self.size, dtype=torch.uint8)
        if pin:
            pin_in_place(self.buffer)
        before = [parameter.data for parameter in self.parameters]
        self.lie_in(self.buffer)
        for parameter, values in zip(self.parameters, before):
            parameter.data.copy_(values)

    def lie_in(self, buffer: Tensor) -> None:
        """Let the parameters be what ``buffer`` holds."""
        for parameter, start in zip(self.parameters, self.starts):
            size = parameter.numel() * parameter.element_size()
            parameter.data = buffer[start : start + size].view(parameter.dtype).view(parameter.shape)


class _Room:
    def __init__(self, buffer: Tensor):
        self.buffer = buffer
        self.held: _Held | None = None
        self.ready: Callable[[], None] = lambda: None


def copy_now(room: Tensor, values: Tensor) -> Callable[[], None]:
    room.copy_(values)
    return lambda: None


class CudaCopy:
    """Copies on a stream of its own, beside what the device computes."""

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)

    def __call__(self, room: Tensor, values: Tensor) -> Callable[[], None]:
        computing = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(computing)  # what is queued there may still read the room
        with torch.cuda.stream(self.stream):
            room.copy_(values, non_blocking=True)
            done = self.stream.record_event()
        return lambda: torch.cuda.current_stream(self.device).wait_event(done)


def pin_in_place(buffer: Tensor) -> None:
    """Let a device read the memory of ``buffer`` by itself. Where the system refuses, copies are waited for.

    torch's own pinned memory comes in powers of two, which blocks of 142 and 340 MB miss by half.
    """
    cuda = torch.cuda.cudart()
    if int(cuda.cudaHostRegister(buffer.data_ptr(), buffer.numel(), PORTABLE)) == 0:
        weakref.finalize(buffer, cuda.cudaHostUnregister, buffer.data_ptr())
