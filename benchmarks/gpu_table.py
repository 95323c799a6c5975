"""The tables of docs/performance.md about GPUs, made of what was measured there.

python -m benchmarks.gpu_table        # writes them between their marks
"""

import json
import re
from pathlib import Path

from benchmarks.interleave import RESULTS

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
CARD = "h200"
MARKS = ("<!-- gpu: python -m benchmarks.gpu_table -->", "<!-- end of gpu -->")
WAYS = {
    "eager": "as it comes",
    "int8 products": '`base.matmul = "int8"`',
    "fp8 products": '`base.quant = "fp8"`, `base.matmul = "fp8"`',
    "half checkpointed": "half of the blocks checkpointed",
    "one block in 3 waits on the CPU": "`base.swap = 19`",
    "compiled blocks": '`train.compile = "blocks"`',
    "compiled blocks, kernels apart": '`train.compile = "blocks"`, without combined kernels',
    "compiled blocks, cuDNN's attention": '`train.compile = "blocks"`, `train.attention = "cudnn"`',
    "compiled blocks, int8 products": '`train.compile = "blocks"`, `base.matmul = "int8"`',
    "compiled blocks, fp8 products": '`train.compile = "blocks"`, `base.matmul = "fp8"`',
    "cuDNN's attention": '`train.attention = "cudnn"`',
    "inputs of blocks on the CPU": "`train.offload_activations = true`",
    "recorded": "recorded as a CUDA graph (not built)",
    "recorded, bf16 base": "recorded, base in bf16 (not built)",
}


def read(name: str) -> dict:
    return json.loads((RESULTS / f"gpu_{name}_{CARD}.json").read_text())


def steps() -> list[str]:
    """Time and memory of steps."""
    facts = read("ladder")
    rows = [f"{facts['device']}, torch {facts['torch']}, bf16 matmul {facts['matmul_tflops']:.0f} TFLOP/s.", ""]
    rows += ["| step of FLUX.1 | px | batch | checkpointing | ms a step | ms a sample | useful TFLOP/s | peak, GB |"]
    rows += ["|---|---|---|---|---|---|---|---|"]
    for c in facts["cells"]:
        if c["status"] != "ok":
            continue
        on = "half" if c["checkpointing"] is None else "yes" if c["checkpointing"] else "no"
        numbers = f"{c['step_ms']:.0f} | {c['sample_ms']:.0f} | {c['useful_tflops']:.0f} | {c['peak_gb']:.1f}"
        rows.append(f"| {WAYS[c['how']]} | {c['pixels']} | {c['batch']} | {on} | {numbers} |")
    return rows


def peers() -> list[str]:
    """Against steps of others."""
    rows = ["| our step against | px | captions padded there | times as fast (least to greatest) |", "|---|---|---|---|"]
    for r in read("peers")["rows"]:
        if "median" in r:
            ratio = f"{r['median']:.2f} ({r['least']:.2f} to {r['greatest']:.2f})"
            padded = "to 512" if r["captions padded there"] else "no"
            name = {"lora": "LoRA", "lokr": "LoKr"}[r["adapter"]]
            rows.append(f"| {name}: {r['against']} | {r['pixels']} | {padded} | {ratio} |")
    return rows


def products() -> list[str]:
    """Layers' products, microseconds."""
    rows = [
        "Microseconds of products:",
        "",
        "| layer | tokens | pass | bf16, codes made floats | int8: ours + quantizing | torch's int8 |",
    ]
    rows += ["|---|---|---|---|---|---|"]
    for r in read("products")["rows"]:
        ours = f"{r['ours_us']:.0f} + {r['quantize_us']:.0f}"
        theirs = r.get("torch_transposing_us", r["torch_us"])
        rows.append(
            f"| {r['in']} to {r['out']} | {r['tokens']} | {r['direction']} | {r['bf16_us']:.0f} | {ours} | {theirs:.0f} |"
        )
    return rows


def tables() -> str:
    parts = [steps(), peers(), products()]
    return "\n".join([MARKS[0], "", *("\n".join(part) + "\n" for part in parts), MARKS[1]])


def main() -> None:
    page = PAGE.read_text()
    PAGE.write_text(re.sub(f"{re.escape(MARKS[0])}.*?{re.escape(MARKS[1])}", lambda _: tables(), page, flags=re.DOTALL))


if __name__ == "__main__":
    main()
