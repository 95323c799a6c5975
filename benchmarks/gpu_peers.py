"""Our step of FLUX.1 at full size against those that a user would otherwise run, on one GPU, on random weights.

python -m benchmarks.gpu_peers --out peers.json                       # about 80 seconds
python -m benchmarks.gpu_peers --device cpu --tiny --out peers.json   # the same code on a small network

Both with gradient checkpointing, batch 1, captions of 80 tokens, steps in turn; > 1: ours is faster.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks.gpu import FAMILY, FULL, TINY, Clock, Setup, Sizes, blank, device_name, fill, materialise, set_up
from benchmarks.interleave import ratio
from benchmarks.peers import their_step, with_lycoris, with_peft
from dedistill.distributed.launcher import choose_kernels
from dedistill.models import blocks as blocks_of
from dedistill.models.quantize import cast_float

PADDED = 512


def plain(sizes: Sizes, device: str, seed: int = 0) -> nn.Module:
    """The network in bf16."""
    denoiser = blank(sizes).denoiser
    cast_float(denoiser, torch.bfloat16)
    materialise(denoiser, device, torch.Generator(device).manual_seed(seed))
    denoiser.requires_grad_(False).enable_gradient_checkpointing()
    return denoiser


def by_quanto(sizes: Sizes, device: str) -> nn.Module:
    """The network with its blocks' weights in int8 by quanto."""
    from optimum.quanto import freeze, qint8, quantize

    denoiser = plain(sizes, device)
    quantize(denoiser, weights=qint8, include=["transformer_blocks.*", "single_transformer_blocks.*"])
    freeze(denoiser)
    return denoiser


PEERS: list[tuple[str, str, Callable[[nn.Module, Setup], list[nn.Parameter]], Callable[[Sizes, str], nn.Module]]] = [
    ("lora", "PEFT on a bf16 base, as diffusers' script", with_peft, plain),
    ("lokr", "LyCORIS as it comes on a bf16 base", with_lycoris, plain),
    ("lokr", "LyCORIS as it comes on an int8 base by quanto", with_lycoris, by_quanto),
]


def compared(sizes: Sizes, device: str, clock: Clock, facts: dict, write: Callable[[], None], wanted: str) -> None:
    """wanted: a part of the labels of those that are to be compared."""
    components = blank(sizes)
    fill(components.denoiser, device)
    blocks_of.checkpoint_blocks(components.denoiser, FAMILY.blocks(components.denoiser), True)
    small, large = sizes.pixels
    for adapter, label, attach, network in PEERS:
        if clock.over():
            break
        if wanted not in label:
            continue
        setup = set_up(components, sizes, adapter, device)
        try:
            clock.reset_memory()
            theirs = network(sizes, device)
            trained = attach(theirs, setup)
            for pixels, tokens in ((small, PADDED), (small, None), (large, PADDED)):
                row = {"adapter": adapter, "against": label, "pixels": pixels, "captions padded there": tokens is not None}
                # quanto's products take one dtype, which autocast does not see to
                dtype = torch.bfloat16 if network is by_quanto else torch.float32
                step = their_step(theirs, trained, setup, pixels, tokens, dtype=dtype)
                facts["rows"].append(row | against(setup, step, pixels, clock))
                print(facts["rows"][-1], flush=True)
                write()
        except Exception as e:
            # one peer that fails must not cost the others
            facts["rows"].append({"against": label, "failed": f"{type(e).__name__}: {str(e)[:300]}"})
            print(facts["rows"][-1], flush=True)
        theirs = trained = None
        setup.model.adapter.detach_from_base()


def against(setup: Setup, theirs: Callable[[], float], pixels: int, clock: Clock) -> dict:
    """Ratios, milliseconds and peaks of memory; both networks lie on the device meanwhile."""
    generator = torch.Generator(setup.model.device).manual_seed(0)
    ours = lambda: setup.step(pixels, 1, generator)  # noqa: E731
    found = {}
    for name, step in (("our", ours), ("their", theirs)):
        step()
        start = clock.now()
        step()
        found[f"{name}_ms"] = 1e3 * (clock.now() - start)
    return ratio(ours, theirs, pairs=3, warmup=0) | found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--against", default="", help="only those whose names hold this, as quanto")
    parser.add_argument("--seconds", type=float, default=90, help="what would start later is skipped")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    choose_kernels(exact=False)
    facts = {"device": device_name(args.device), "torch": torch.__version__, "rows": []}
    began = time.perf_counter()
    write = lambda: args.out.write_text(json.dumps(facts, indent=1) + "\n")  # noqa: E731
    compared(TINY if args.tiny else FULL, args.device, Clock(args.device, args.seconds), facts, write, args.against)
    print(f"done in {time.perf_counter() - began:.0f} s: {args.out}")


if __name__ == "__main__":
    main()
