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
from lycoris.modules.lokr import LokrModule
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from benchmarks.gpu import CHANNELS, PATCH, VAE, Setup, Sizes, blank, set_up
from benchmarks.interleave import RESULTS, ratio
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


def their_step(denoiser: nn.Module, trained: list[nn.Parameter], setup: Setup, tokens: int | None) -> Callable[[], object]:
    """One step as scripts around diffusers do it: packed latents, no mask, one mean over all numbers, AdamW.

    tokens: length captions are padded to; None: not at all.
    """
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    side = SIZES.pixels[0] // VAE // PATCH
    ids = torch.stack(torch.meshgrid(*(torch.arange(n).float() for n in (1, side, side)), indexing="ij"), -1).reshape(-1, 3)
    generator = torch.Generator().manual_seed(1)

    def packed(x: torch.Tensor) -> torch.Tensor:
        return x.reshape(1, CHANNELS, side, PATCH, side, PATCH).permute(0, 2, 4, 1, 3, 5).reshape(1, side * side, -1)

    def step() -> float:
        data, noise, sigma, text, pooled = setup.samples(SIZES.pixels[0], 1, generator)
        text = nn.functional.pad(text, (0, 0, 0, (tokens or text.shape[1]) - text.shape[1]))
        with torch.autocast("cpu", torch.bfloat16):
            out = denoiser(
                hidden_states=packed(sigma * noise + (1 - sigma) * data),
                timestep=sigma.flatten(),
                encoder_hidden_states=text,
                pooled_projections=pooled,
                txt_ids=torch.zeros(text.shape[1], 3),
                img_ids=ids,
                return_dict=False,
            )[0]
        loss = (out.float() - packed(noise - data)).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def peft_step(setup: Setup, tokens: int | None) -> Callable[[], object]:
    """LoRA of PEFT, rank 16, on the layers that ``setup`` trains."""
    denoiser = network()
    inject_adapter_in_model(LoraConfig(r=16, lora_alpha=16, target_modules=[t.name for t in setup.model.targets]), denoiser)
    trained = [p for n, p in denoiser.named_parameters() if "lora_" in n]
    assert sum(p.numel() for p in trained) == sum(p.numel() for p in setup.model.trainable().values())
    for parameter in trained:
        parameter.data = parameter.data.float()  # the script trains in float32 under autocast
    return their_step(denoiser, trained, setup, tokens)


def lycoris_step(setup: Setup, tokens: int | None) -> Callable[[], object]:
    denoiser = network()
    modules = nn.ModuleList()
    for t in setup.model.targets:
        linear = denoiser.get_submodule(t.name)
        modules.append(LokrModule(t.name.replace(".", "_"), linear, 1.0, 10000, 1, factor=t.factor, full_matrix=True))
        modules[-1].apply_to()
    trained = list(modules.to(torch.bfloat16).parameters())
    assert sum(p.numel() for p in trained) == sum(p.numel() for p in setup.model.trainable().values())
    return their_step(denoiser, trained, setup, tokens)


def steps() -> dict[str, dict]:
    rows = {}
    for adapter, theirs in (("lora", peft_step), ("lokr", lycoris_step)):
        name = {"lora": "LoRA of rank 16, vs PEFT in diffusers' script", "lokr": "LoKr of factor 4, vs LyCORIS as it comes"}[
            adapter
        ]
        for quant in ("none", "int8"):
            own, setup = own_step(adapter, quant)
            base = {"none": "bf16 base", "int8": "int8 base"}[quant]
            rows[f"{name}, {base}"] = ratio(own, theirs(setup, PADDED), pairs=9)
            rows[f"{name}, {base}, captions not padded there either"] = ratio(own, theirs(setup, None), pairs=9)
    return rows


# --- what stands around a step ---------------------------------------------------------------------------------------


def around() -> dict[str, float]:
    """Milliseconds per step of what is neither the network nor the optimizer, in a run on the digits."""
    from dedistill.distributed.heartbeat import Pulse
    from dedistill.distributed.world import World
    from dedistill.runs.metrics import MetricsLogger
    from dedistill.runs.requests import StopRequests
    from dedistill.train import main
    from dedistill.training import engine
    from dedistill.training.guards import Guard, ParameterChangeCheck

    counted = {
        "is the step good": (Guard, "judge"),
        "is the optimizer's state finite": (engine, "state_norm"),
        "did the weights change": (ParameterChangeCheck, "check"),
        "rows of metrics": (MetricsLogger, "write"),
        "was anything asked for": (StopRequests, "poll"),
        "what other processes say": (World, "gather"),
        "signs of life": (Pulse, "beat"),
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
