"""One AdamW step of any number of bf16 tensors in a single kernel on a GPU: 22 bytes per number move once.

Each operation of :class:`dedistill.training.optim.KahanAdamW` on single tensors is done here with the same roundings. By
tensors it takes 15 kernels each, and a host that launches them for longer than the GPU works.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
Lists = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]
"""Parameters, gradients, first and second moments (bf16), and what rounding keeps from the parameters (float32)."""


class Places:
    """Which block of which tensor each program of the kernel works on; made once for tensors of the same sizes."""

    def __init__(self, parameters: list[Tensor]):
        self.sizes = [p.numel() for p in parameters]
        device = parameters[0].device
        blocks = torch.tensor([triton.cdiv(size, BLOCK) for size in self.sizes])
        which = torch.repeat_interleave(torch.arange(len(self.sizes)), blocks)
        first = torch.cumsum(blocks, 0) - blocks
        self.which = which.to(device, torch.int32)
        self.block = (torch.arange(len(which)) - first[which]).to(device, torch.int32)
        self.numel = torch.tensor(self.sizes, device=device)

    def fits(self, parameters: list[Tensor]) -> bool:
        return self.sizes == [p.numel() for p in parameters]


def step(places: Places, tensors: Lists, *, lr: float, keep: float, keep_square: float, eps: float, decay: float) -> None:
    """One step in place. keep, keep_square: what is kept of both moments, corrected for their start at zero."""
    for tensor in (t for one in tensors for t in one):
        if not tensor.is_contiguous():
            raise ValueError("the tensors of a fused step must be contiguous")
    table = torch.tensor([[t.data_ptr() for t in one] for one in tensors]).to(places.which.device, non_blocking=True)
    numbers = (lr, 1 - keep, keep_square, 1 - keep_square, eps, lr * decay)
    _step[(len(places.which),)](table, places.which, places.block, places.numel, len(places.sizes), *numbers, BLOCK=BLOCK)


def distance(device: torch.device) -> float:
    """From the same step in float32, the farthest of the five kinds relative to each."""
    numbers = {"lr": 1e-2, "keep": 0.8, "keep_square": 0.9, "eps": 1e-6, "decay": 0.1}
    draw = lambda kind=torch.bfloat16: [torch.rand(n, device=device).add(0.1).to(kind) for n in (33, 5000)]  # noqa: E731
    tensors: Lists = (draw(), draw(), draw(), draw(), draw(torch.float32))
    before = [torch.cat(one).float() for one in tensors]
    step(Places(tensors[0]), tensors, **numbers)
    weight, gradient, first, second, rest = before
    first, second = 0.8 * first + 0.2 * gradient, 0.9 * second + 0.1 * gradient**2
    moved = weight + rest - 1e-3 * (weight + rest) - 1e-2 * first / (second.sqrt() + 1e-6)
    found = [torch.cat(one).float() for one in tensors]
    pairs = ((found[0] + found[4], moved), (found[2], first), (found[3], second))
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


@triton.jit
def _step(table, which, block, numel, count, lr, fresh, keep_square, fresh_square, eps, decay, BLOCK: tl.constexpr):
    tensor = tl.load(which + tl.program_id(0))
    at = tl.load(block + tl.program_id(0)).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < tl.load(numel + tensor)
    parameters = tl.load(table + tensor).to(tl.pointer_type(tl.bfloat16)) + at
    gradients = tl.load(table + count + tensor).to(tl.pointer_type(tl.bfloat16)) + at
    firsts = tl.load(table + 2 * count + tensor).to(tl.pointer_type(tl.bfloat16)) + at
    seconds = tl.load(table + 3 * count + tensor).to(tl.pointer_type(tl.bfloat16)) + at
    rests = tl.load(table + 4 * count + tensor).to(tl.pointer_type(tl.float32)) + at

    weight = tl.load(parameters, inside).to(tl.float32)
    gradient = tl.load(gradients, inside).to(tl.float32)
    rest = tl.load(rests, inside)
    rest -= decay * (weight + rest)
    first = tl.load(firsts, inside).to(tl.float32)
    nearer = gradient - (gradient - first) * (1 - fresh)  # torch.lerp starts from the nearer end
    first = tl.where(fresh < 0.5, first + fresh * (gradient - first), nearer).to(tl.bfloat16)
    second = (tl.load(seconds, inside).to(tl.float32) * keep_square).to(tl.bfloat16)
    second = (second.to(tl.float32) + fresh_square * gradient * gradient).to(tl.bfloat16)
    root = tl.sqrt_rn(second.to(tl.float32)).to(tl.bfloat16)
    divisor = (root.to(tl.float32) + eps).to(tl.bfloat16)
    rest -= lr * tl.div_rn(first.to(tl.float32), divisor.to(tl.float32))
    moved = (weight + rest).to(tl.bfloat16)
    rest += (weight - moved.to(tl.float32)).to(tl.bfloat16).to(tl.float32)

    tl.store(parameters, moved, inside)
    tl.store(firsts, first, inside)
    tl.store(seconds, second, inside)
    tl.store(rests, rest, inside)
