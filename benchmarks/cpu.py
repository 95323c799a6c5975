"""What a step, the checks around it and the start of a command cost on a CPU.

python -m benchmarks.cpu

A step of ours against two that a user would otherwise run, on the same weights of a small FLUX: the arithmetic of diffusers'
LoRA script (PEFT layers, captions padded to 512 tokens, no mask), and LyCORIS' LoKr as it comes (W + dW built in each pass).
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import wraps

import torch
from torch import nn

from benchmarks.gpu import Setup, Sizes, blank, set_up
from benchmarks.interleave import RESULTS, ratio
from benchmarks.peers import their_step, with_lycoris, with_peft
from dedistill.models.quantize import prepare_base

NETWORK = {"layers": 2, "single_layers": 4, "heads": 4, "head_dim": 64, "rope_axes": [16, 24, 24]}
SIZES = Sizes(NETWORK | {"text_dim": 256, "pooled_dim": 64}, pixels=(256,), steps=1, warmup=0, matmul=64)
PADDED = 512
"""Tokens that the script pads every caption to; ours have 80, all real."""
BUDGET_MS = 50


# --- whole steps -----------------------------------------------------------------------------------------------------


def network() -> nn.Module:
    """The same random weights each time, bf16."""
    denoiser = blank(SIZES).denoiser.to_empty(device="cpu").to(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in denoiser.named_parameters():
        ones = "norm_" in name and name.endswith("weight")
        nn.init.ones_(parameter) if ones else nn.init.normal_(parameter, std=0.02, generator=generator)
    return denoiser.requires_grad_(False)


def own_step(adapter: str, quant: str) -> tuple[Callable[[], object], Setup]:
    components = blank(SIZES)
    components.denoiser = network()
    prepare_base(components.denoiser, quant, [], "cpu")
    setup = set_up(components, SIZES, adapter, "cpu")
    generator = torch.Generator().manual_seed(1)
    return lambda: setup.step(SIZES.pixels[0], 1, generator), setup


def steps() -> dict[str, dict]:
    rows = {}
    for adapter, theirs in (("lora", with_peft), ("lokr", with_lycoris)):
        name = {"lora": "LoRA of rank 16, vs PEFT in diffusers' script", "lokr": "LoKr of factor 4, vs LyCORIS as it comes"}[
            adapter
        ]
        for quant in ("none", "int8"):
            own, setup = own_step(adapter, quant)
            base = {"none": "bf16 base", "int8": "int8 base"}[quant]
            for tokens, label in ((PADDED, ""), (None, ", captions not padded there either")):
                denoiser = network()
                step = their_step(denoiser, theirs(denoiser, setup), setup, SIZES.pixels[0], tokens)
                rows[f"{name}, {base}{label}"] = ratio(own, step, pairs=9)
    return rows


# --- what stands around a step ---------------------------------------------------------------------------------------


def around() -> dict[str, float]:
    """Milliseconds per step of what is neither the network nor the optimizer, in a run on the digits."""
    from dedistill.distributed.outside import Heartbeat, StopRequests
    from dedistill.distributed.world import World
    from dedistill.runs.metrics import MetricsLogger
    from dedistill.train import main
    from dedistill.training.guards import Guard, ParameterChangeCheck

    counted = {
        "is the step good": (Guard, "judge"),
        "did the weights change": (ParameterChangeCheck, "check"),
        "rows of metrics": (MetricsLogger, "write"),
        "was anything asked for": (StopRequests, "poll"),
        "what other processes say": (World, "gather"),
        "signs of life": (Heartbeat, "beat"),
    }
    seconds = dict.fromkeys(counted, 0.0)
    for label, (owner, name) in counted.items():
        setattr(owner, name, _timed(getattr(owner, name), label, seconds))
    steps = 300
    with tempfile.TemporaryDirectory() as folder:
        settings = [
            f"run.out='{folder}/run'",
            f"train.steps={steps}",
            "train.warmup=1",
            "log.every=1",
            f"validate.every={steps}",
        ]
        code = main(["dedistill:digits/teacher", *[w for s in settings for w in ("--set", s)]])
    assert code == 0
    return {label: 1e3 * spent / steps for label, spent in seconds.items()}


def _timed(call: Callable, label: str, seconds: dict[str, float]) -> Callable:
    @wraps(call)
    def timed(*args: object, **kwargs: object) -> object:
        start = time.perf_counter()
        try:
            return call(*args, **kwargs)
        finally:
            seconds[label] += time.perf_counter() - start

    return timed


# --- how long a command takes to begin -------------------------------------------------------------------------------

CHILD = """import resource, subprocess, sys
assert subprocess.run(sys.argv[1:], capture_output=True).returncode == 0
print(sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]))"""
COMMANDS = {
    "--help": ["--help"],
    "train --help": ["train", "--help"],
    "recipes": ["recipes"],
    "plan": ["plan", "dedistill:digits/teacher"],
    "train --print-recipe": ["train", "dedistill:flux_schnell", "--print-recipe"],
}


def starts() -> dict[str, float]:
    """Seconds of processor time, the median of three."""
    found = {}
    for label, words in COMMANDS.items():
        times = []
        for _ in range(3):
            done = subprocess.run(
                [sys.executable, "-c", CHILD, sys.executable, "-m", "dedistill", *words], capture_output=True, text=True
            )
            times.append(float(done.stdout))
        found[label] = statistics.median(times)
    return found


def main() -> None:
    torch.set_num_threads(1)
    facts = {
        "setting": "FLUX of 2 + 4 blocks of width 256, 256 image tokens, captions of 80 tokens, 512 where padded; one thread; "
        "> 1: ours is faster",
        "ratios": steps(),
        "start_cpu_seconds": {k: round(v, 2) for k, v in starts().items()},
    }
    spent = around()
    facts["around_a_step_ms"] = {k: round(v, 3) for k, v in spent.items()}
    facts["share_of_a_step_of_50_ms"] = round(sum(spent.values()) / BUDGET_MS, 4)
    for label, row in facts["ratios"].items():
        print(f"  {label:88} {row['median']:6.2f} ({row['least']:.2f} to {row['greatest']:.2f})")
    print(json.dumps({k: facts[k] for k in ("start_cpu_seconds", "around_a_step_ms", "share_of_a_step_of_50_ms")}, indent=1))
    (RESULTS / "cpu.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
