"""What one part of the training step of FLUX.1 may be changed to, for a while: the rows of ``benchmarks.gpu_ladder``."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from benchmarks.before import relink, swapped
from benchmarks.gpu import Setup
from dedistill.kernels import attention
from dedistill.models import blocks as blocks_of
from dedistill.models import compiled as compiling
from dedistill.models import quantize
from dedistill.models.products import FP8
from dedistill.models.swap import Swap, spread

# --- what is not built yet -------------------------------------------------------------------------------------------


@contextmanager
def graphed(setup: Setup) -> Iterator[None]:
    """Forward and backward of each shape recorded once, then played from one launch; gradients stay where they are."""
    if setup.model.device.type != "cuda":
        yield
        return
    eager, trained = setup.forward_backward, list(setup.model.trainable().values())
    recorded: dict[tuple, tuple] = {}

    def play(*samples: Tensor) -> Tensor:
        key = (*(s.shape for s in samples), setup.model.components.denoiser.is_gradient_checkpointing)
        if key not in recorded:
            recorded[key] = record(samples)
        graph, inputs, loss = recorded[key]
        for held, sample in zip(inputs, samples):
            held.copy_(sample)
        graph.replay()
        return loss

    def record(samples: tuple[Tensor, ...]) -> tuple:
        inputs, stream = [s.clone() for s in samples], torch.cuda.Stream()
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                eager(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = eager(*inputs)
        torch._foreach_zero_([p.grad for p in trained])
        return graph, inputs, loss

    zero = lambda set_to_none: torch._foreach_zero_([p.grad for p in trained if p.grad is not None])  # noqa: E731
    with swapped(setup, "forward_backward", play), swapped(setup.optimizer, "zero_grad", zero):
        yield
    recorded.clear()
    setup.optimizer.zero_grad(set_to_none=True)


@contextmanager
def dense(setup: Setup) -> Iterator[None]:
    """The base as bf16 weights."""
    denoiser = setup.model.components.denoiser
    linears = [module for module in denoiser.modules() if isinstance(module, quantize.QuantizedLinear)]
    codes = {module: module.weight for module in linears}
    for module in linears:
        module.weight = nn.Parameter(module.dequantized(), requires_grad=False)
    with swapped(quantize.QuantizedLinear, "forward", lambda module, x: nn.functional.linear(x, module.weight, module.bias)):
        relink(setup)
        yield
    for module in linears:
        module.weight = codes[module]
    relink(setup)


@contextmanager
def int8_products(setup: Setup) -> Iterator[None]:
    """base.matmul = "int8"."""
    denoiser = setup.model.components.denoiser
    multiplied = quantize.multiply_codes(denoiser, setup.model.family.blocks(denoiser), setup.model.device, "base.matmul")
    yield
    for name in multiplied:
        denoiser.get_submodule(name).products = False


@contextmanager
def fp8_products(setup: Setup) -> Iterator[None]:
    """base.quant and base.matmul = "fp8", of the numbers that the int8 base stands for."""
    denoiser = setup.model.components.denoiser
    linears = [module for module in denoiser.modules() if isinstance(module, quantize.QuantizedLinear)]
    before = {module: (module.weight, module.weight_scale) for module in linears}

    def store(module: nn.Module, weight: Tensor, scale: Tensor) -> None:
        module.weight, module.weight_scale = (nn.Parameter(t, requires_grad=False) for t in (weight, scale))

    for module in linears:
        store(module, *quantize.quantize_rows(module.dequantized(), FP8))
    multiplied = quantize.multiply_codes(
        denoiser, setup.model.family.blocks(denoiser), setup.model.device, "base.matmul", "fp8"
    )
    relink(setup)
    yield
    for name in multiplied:
        denoiser.get_submodule(name).products = False
    for module in linears:
        store(module, *before[module])
    relink(setup)


@contextmanager
def half_checkpointed(setup: Setup) -> Iterator[None]:
    """train.gradient_checkpointing = half of the blocks."""
    denoiser = setup.model.components.denoiser
    blocks = setup.model.family.blocks(denoiser)
    blocks_of.checkpoint_blocks(denoiser, blocks, len(blocks) // 2)
    yield
    checkpointing(setup, True)


@contextmanager
def compiled(setup: Setup) -> Iterator[None]:
    """train.compile = "blocks"; without a GPU, graphs alone."""
    family = setup.model.family
    blocks = family.blocks(setup.model.components.denoiser)
    with swapped(compiling, "COMPILER", "inductor" if setup.model.device.type == "cuda" else "eager"):
        compiling.compile_blocks(family, blocks)
        yield
    for block in blocks:
        del block.forward


@contextmanager
def compiled_apart(setup: Setup) -> Iterator[None]:
    """The same without kernels that are made one."""
    with swapped(compiling, "OPTIONS", compiling.OPTIONS | {"combo_kernels": False}), compiled(setup):
        yield


@contextmanager
def cudnn(setup: Setup) -> Iterator[None]:
    """train.attention = "cudnn"."""
    with swapped(F, "scaled_dot_product_attention", F.scaled_dot_product_attention):
        if attention.use(setup.model.device) != "cudnn" and setup.model.device.type == "cuda":
            raise RuntimeError("cuDNN's attention was not proven; the note above says why")
        yield


@contextmanager
def compiled_cudnn(setup: Setup) -> Iterator[None]:
    with cudnn(setup), compiled(setup):
        yield


@contextmanager
def offloaded(setup: Setup) -> Iterator[None]:
    """train.offload_activations = true."""
    denoiser = setup.model.components.denoiser
    blocks_of.checkpoint_blocks(denoiser, setup.model.family.blocks(denoiser), True, away=True)
    yield
    checkpointing(setup, True)


@contextmanager
def both(setup: Setup) -> Iterator[None]:
    with int8_products(setup), compiled(setup):
        yield


@contextmanager
def both_fp8(setup: Setup) -> Iterator[None]:
    with fp8_products(setup), compiled(setup):
        yield


@contextmanager
def recorded_floats(setup: Setup) -> Iterator[None]:
    with dense(setup), graphed(setup):
        yield


def swap(setup: Setup, count: int) -> int:
    """base.swap = ``count``, for good; returns the bytes that wait on the CPU."""
    blocks = setup.model.family.blocks(setup.model.components.denoiser)
    return int(Swap([blocks[i] for i in spread(count, len(blocks))], setup.model.device).facts["host_bytes"])


def checkpointing(setup: Setup, on: bool) -> None:
    denoiser = setup.model.components.denoiser
    if not on:
        return denoiser.disable_gradient_checkpointing()
    # nothing is drawn at random within a block, and the state of a GPU's generator cannot be read while a graph is recorded
    denoiser.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False, preserve_rng_state=False))
