"""Attention alone on a GPU: what each of torch's kernels costs and how exact it is."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu import Clock, attempt, timed

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def attention(device: str, tokens: tuple[int, ...], clock: Clock) -> list[dict]:
    """Milliseconds of attention forward and backward: each kernel, plain, deterministic and with a mask of keys."""
    rows = []
    for count, (name, kernel), how in product(tokens, KERNELS.items(), ("plain", "deterministic", "mask")):
        q, k, v = (torch.randn(1, 24, count, 128, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        mask = torch.arange(count, device=device)[None, None, None] >= 40 if how == "mask" else None

        def step(q=q, k=k, v=v, mask=mask) -> None:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            out.backward(torch.randn_like(out))

        def call(step=step, kernel=kernel, how=how) -> float:
            with sdpa_kernel(kernel), deterministic() if how == "deterministic" else nullcontext():
                return 1e3 * timed(step, clock)

        rows.append({"tokens": count, "kernel": name, "how": how, "ms": attempt(call)})
    return rows


class ContiguousGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad.contiguous()


def one_pass(drawn: list[Tensor], kernel: SDPBackend, dtype: torch.dtype, whole: bool = False) -> list[Tensor]:
    """Output and gradients; ``drawn``: queries, keys, values and the gradient from above. whole: that is made contiguous."""
    *inputs, above = (t.to(dtype) for t in drawn)
    inputs = [t.requires_grad_() for t in inputs]
    with sdpa_kernel(kernel):
        out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in inputs))
        out = (ContiguousGradient.apply(out) if whole else out).transpose(1, 2)
        return [out, *torch.autograd.grad(out, inputs, above)]


def layouts(device: str, tokens: tuple[int, ...], clock: Clock) -> list[dict]:
    """Attention as the network calls it, heads after tokens in memory: milliseconds forward and backward, and how far outputs
    and gradients are from float32's."""
    rows = []
    for count in tokens:
        drawn = [torch.randn(1, count, 24, 128, device=device, dtype=torch.bfloat16) for _ in range(4)]
        passes = partial(one_pass, drawn)
        truth = passes(SDPBackend.EFFICIENT_ATTENTION if device != "cpu" else SDPBackend.MATH, torch.float32)
        for name, kernel, whole in (
            ("flash", KERNELS["flash"], False),
            *(("cudnn", KERNELS["cudnn"], w) for w in (False, True)),
        ):
            call = partial(passes, kernel, torch.bfloat16, whole)

            def measured(call: Callable[[], list[Tensor]] = call, truth: list[Tensor] = truth) -> dict:
                far = [float((a.float() - b).detach().norm() / b.detach().norm()) for a, b in zip(call(), truth)]
                return {"ms": 1e3 * timed(call, clock), "far": far}

            found = attempt(measured)
            rows.append({"tokens": count, "kernel": name, "gradient made contiguous": whole, "found": found})
    return rows


def plans(device: str, tokens: int, clock: Clock) -> list[dict]:
    """What another length costs the first time: cuDNN makes a plan for each."""
    rows = []
    for name, count in product(("flash", "cudnn"), (tokens + n for n in (1, 2, 17))):
        drawn = [torch.randn(1, count, 24, 128, device=device, dtype=torch.bfloat16) for _ in range(4)]

        def once(drawn: list[Tensor] = drawn, kernel: SDPBackend = KERNELS[name]) -> float:
            start = clock.now()
            one_pass(drawn, kernel, torch.bfloat16)
            return 1e3 * (clock.now() - start)

        rows.append({"tokens": count, "kernel": name, "first_ms": attempt(once), "again_ms": attempt(once)})
    return rows
