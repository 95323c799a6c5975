"""Kernels of a step of FLUX.1 with ``train.compile = "blocks"``, counted in the code that torch's compiler writes for an H200.

python -m benchmarks.compiled        # two minutes of one core; no GPU

The compiler works on a card without numbers (tests/fake_cuda) and writes the Triton kernels and calls of one block of each
kind, full width, forward and backward; nothing of it is run. What is around the blocks is counted as in benchmarks.forecast
--counts. A call of cuBLAS or of attention counts as one kernel, in both. Written with the torch at hand; others differ.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "fake_cuda"))
import device  # noqa: F401, E402, I001 - before torch

import json  # noqa: E402
import re  # noqa: E402
import time  # noqa: E402
from collections import Counter  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from contextlib import ExitStack, contextmanager  # noqa: E402
from dataclasses import replace  # noqa: E402
from types import SimpleNamespace  # noqa: E402
from unittest.mock import patch  # noqa: E402

import torch  # noqa: E402
import torch._inductor.compile_fx  # noqa: E402
import triton  # noqa: E402
from steps import Watch, card  # noqa: E402
from torch import nn  # noqa: E402
from torch._dynamo.device_interface import CudaInterface  # noqa: E402
from torch._inductor.graph import GraphLowering  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.utils import _triton  # noqa: E402
from torch.utils._pytree import tree_map_only  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

import dedistill.kernels as kernels  # noqa: E402
from benchmarks import counts, gpu  # noqa: E402
from dedistill.forecast import depth  # noqa: E402
from dedistill.forecast.kernels import attention_of_cards  # noqa: E402
from dedistill.models.compiled import compile_blocks  # noqa: E402
from dedistill.models.registry import get_family  # noqa: E402
from dedistill.recipe import load_recipe  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "compiled.json"
FACTS = {
    "name": "NVIDIA H200",
    "major": 9,
    "minor": 0,
    "multi_processor_count": 132,
    "warp_size": 32,
    "total_memory": 141 << 30,
}
FACTS |= {"regs_per_multiprocessor": 65536, "max_threads_per_multi_processor": 2048, "max_threads_per_block": 1024}
FACTS |= {"shared_memory_per_block_optin": 232448, "L2_cache_size": 50 << 20, "gcnArchName": ""}
PLACE = torch.device("cuda", 0)
KINDS = {"double": 0, "single, modulation adapted": 2, "single, all adapted": -1}
"""Of the network of 2 + 4 blocks that is compiled: which block stands for the kind."""
DEEP = {"double": 19, "single, modulation adapted": 19, "single, all adapted": 19}
"""Blocks of each kind in FLUX.1 with the LoKr of dedistill:flux_schnell."""


class Written(Exception):
    """A graph's code is there, and nothing could run it."""


class Driver:
    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return PLACE


def launches(code: str) -> Counter:
    """Of the function ``call`` in what the compiler writes: Triton's kernels, and calls by name."""
    found = Counter()
    for line in code[code.index("def call(") :].split("\ndef benchmark")[0].splitlines():
        line = line.split("#")[0].strip()
        if re.match(r"\w+\.run\(", line):
            found["triton"] += 1
        elif call := re.match(r"(?:\(?[\w, ]+\)? = )?(?:extern_kernels|torch\.ops\.\w+)\.(\w+)", line):
            found[call[1]] += 1
    return found


@contextmanager
def compiler(written: list[tuple[str, str]]) -> Iterator[None]:
    """The compiler as on a card; the code of each graph comes to ``written``, with its direction."""

    def keep(graph: GraphLowering) -> SimpleNamespace:
        written.append(("backward" if graph.is_backward else "forward", graph.codegen()[0].value))
        return SimpleNamespace(call=stop, __file__="none", runner=None)

    def stop(_: object) -> None:
        raise Written

    facts = SimpleNamespace(**FACTS)
    answers = {"get_device_properties": facts, "device_count": 1, "current_device": 0, "is_bf16_supported": True}
    triton.runtime.driver.set_active(Driver())
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(patch.object(CudaInterface, name, staticmethod(lambda *_, answer=answer, **__: answer)))
        for name, answer in {"get_device_properties": facts, "device_count": 1, "get_device_capability": (9, 0)}.items():
            stack.enter_context(patch.object(torch.cuda, name, lambda *_, answer=answer: answer))
        for module in (_triton, torch._inductor.scheduler, torch._inductor.compile_fx):
            stack.enter_context(patch.object(module, "has_triton", lambda: True))
        stack.enter_context(patch.object(_triton, "triton_hash_with_backend", lambda: "none"))
        stack.enter_context(patch.object(GraphLowering, "compile_to_module", keep))
        stack.enter_context(patch.object(kernels, "proven", {(PLACE, name) for name in kernels.KERNELS}))
        stack.enter_context(torch._functorch.config.patch(force_non_lazy_backward_lowering=True))
        # folding would compute constants on the card
        own = {"force_disable_caches": True, "compile_threads": 1, "joint_graph_constant_folding": False}
        stack.enter_context(torch._inductor.config.patch(own))
        yield


def network() -> tuple[gpu.Setup, dict[nn.Module, dict]]:
    """FLUX.1 with fewer blocks and a LoKr, and what each block is called with in a step at 512 px."""
    sizes = replace(gpu.FULL, network=gpu.FULL.network | {"layers": 2, "single_layers": 4})
    seen, generator = {}, torch.Generator()
    with (
        Watch(),
        patch.object(torch, "Generator", lambda *_: generator),
        patch.object(gpu, "check_started", lambda *_, **__: None),
        patch.object(kernels, "prove", lambda *_: None),
        patch.object(F, "scaled_dot_product_attention", attention_of_cards),
    ):
        components = gpu.blank(sizes)
        gpu.fill(components.denoiser, "cuda")
        setup = gpu.set_up(components, sizes, "lokr", "cuda")
        hooks = [
            block.register_forward_pre_hook(lambda block, _, given: seen.update({block: given}), with_kwargs=True)
            for block in gpu.FAMILY.blocks(components.denoiser)
        ]
        setup.forward_backward(*setup.samples(512, 1, generator))
        for hook in hooks:
            hook.remove()
    return setup, seen


def compiled() -> dict[str, dict]:
    """Of each kind of block: kernels forward and backward, and seconds of one core that it took to write them."""
    found, written = {}, []
    with card():
        setup, seen = network()
        denoiser = setup.model.components.denoiser
        blocks = gpu.FAMILY.blocks(denoiser)
        compile_blocks(gpu.FAMILY, blocks)
        with compiler(written), patch.object(F, "scaled_dot_product_attention", attention_of_cards):
            for kind, at in KINDS.items():
                block, start = blocks[at], time.process_time()
                given = tree_map_only(torch.Tensor, lambda t: t.detach().requires_grad_(t.requires_grad), seen[block])
                try:
                    block(**given)
                except Written:
                    row = {way: dict(launches(code)) for way, code in written}
                    # text and image are put together and taken apart around what is compiled
                    row |= {"around": int(gpu.FAMILY.joins_text(block)), "seconds": round(time.process_time() - start, 1)}
                    found[kind] = row
                    print(kind, json.dumps(row), flush=True)
                written.clear()
    return found


def around() -> int:
    """Kernels of a step beside its blocks: what is left at a depth of none, since each block adds the same."""
    recipe = load_recipe("dedistill:flux_schnell", counts.SETTINGS)
    case = depth.Case(recipe, get_family(recipe.model.family), counts.SAMPLE, counts.LENGTH)
    outline = depth._outline(case)
    least = [1] * len(outline.stacks)
    start = depth._measured(case, outline, least)
    total = start.total(*start.work).kernels
    for i in range(len(least)):
        more = depth._measured(case, outline, [n + (i == j) for j, n in enumerate(least)])
        total -= more.total(*more.work).kernels - start.total(*start.work).kernels
    return total


def main() -> None:
    torch.set_num_threads(1)
    rest, kinds = around(), compiled()
    ways = "forward", "backward"
    sums = {kind: {way: sum(row[way].values()) + row["around"] for way in ways} for kind, row in kinds.items()}
    again, once = (sum(n * (times * sums[k]["forward"] + sums[k]["backward"]) for k, n in DEEP.items()) for times in (2, 1))
    facts = {"torch": torch.__version__, "kinds": kinds, "beside blocks": rest}
    facts |= {"kernels, all blocks checkpointed": rest + again, "kernels, none checkpointed": rest + once}
    RESULTS.write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps({name: n for name, n in facts.items() if name != "kinds"}))


if __name__ == "__main__":
    main()
