"""What ``base.matmul = "int8"`` and ``"fp8"`` cost in quality: layer by layer, and in digits de-distilled on the same seeds.

python -m benchmarks.products --work /tmp/products      about 12 minutes on 2 cores; run again to continue
python -m benchmarks.products                           layers alone, half a minute

A teacher, its student and three de-distillations of each arithmetic, all shorter than the demo's.
"""

import argparse
import json
import re
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.interleave import RESULTS
from dedistill.cli import pairs
from dedistill.models.products import FORMATS, Format, quantize_tokens
from dedistill.models.quantize import QuantizedLinear
from dedistill.train import main as train

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
MARKS = ("<!-- products: python -m benchmarks.products -->", "<!-- end of products -->")
SEEDS = (0, 1, 2)
STEPS = {"teacher": 500, "student": 250, "dedistill": 300}
PAIRS = 768
WIDTH = 1.96
WAYS = {"float": "int8", "int8": "int8", "fp8": "fp8"}
"""base.matmul -> base.quant."""
E5M2 = Format(torch.float8_e5m2, 57344, torch.uint8, 16)
TOKENS, SIDE = 256, 3072
NUMBERS = {
    "normal": lambda shape: torch.randn(shape),
    "GELU of normal": lambda shape: F.gelu(2 * torch.randn(shape), approximate="tanh"),
    "1 channel in 100 is 20 times the others": lambda shape: torch.randn(shape) * (1 + 19 * (torch.rand(shape[1]) < 0.01)),
    "tokens between e^-4 and e^4": lambda shape: torch.randn(shape) * torch.randn(shape[0], 1).mul(2).exp(),
    "Student's t of 3": lambda shape: torch.distributions.StudentT(3.0).sample(shape),
    "Student's t of 2": lambda shape: torch.distributions.StudentT(2.0).sample(shape),
}


def cosine(a: Tensor, b: Tensor) -> float:
    return round(float(F.cosine_similarity(a.double().flatten(), b.double().flatten(), 0)), 6)


def layers() -> list[dict]:
    """Cosines of a layer's output and of its input's gradient to those in float32, weights and all."""
    rows = []
    for numbers, draw in NUMBERS.items():
        torch.manual_seed(0)
        linear = nn.Linear(SIDE, SIDE)
        x, above = draw((TOKENS, SIDE)), draw((TOKENS, SIDE))
        truth = linear(x).detach(), above @ linear.weight.detach()
        for name, format in FORMATS.items():
            ours = QuantizedLinear.of(linear, format)
            ours.products = True
            given = x[None].requires_grad_()
            out = ours(given)
            found = out.detach()[0], torch.autograd.grad(out, given, above[None])[0][0]
            rows.append({"numbers": numbers, "format": name, "output": cosine(found[0], truth[0])})
            rows[-1]["gradient"] = cosine(found[1], truth[1])
        codes, scale = ours.weight.view(format.codes).float(), ours.weight_scale.flatten()
        coarse, steps = quantize_tokens(above, scale, E5M2)
        rows.append({"numbers": numbers, "format": "fp8, gradients in e5m2"})
        rows[-1]["gradient"] = cosine(coarse.float() * steps @ codes, truth[1])
    return rows


def tables(facts: dict) -> str:
    """As docs/performance.md shows them."""
    lines = [
        "| numbers | int8: output | gradient | fp8: output | gradient | fp8, gradients in e5m2 |",
        "|---|---|---|---|---|---|",
    ]
    for numbers in NUMBERS:
        int8, fp8, coarse = (row for row in facts["layers"] if row["numbers"] == numbers)
        cells = (int8["output"], int8["gradient"], fp8["output"], fp8["gradient"], coarse["gradient"])
        lines.append(f"| {numbers} | " + " | ".join(f"{n:.4f}" for n in cells) + " |")
    lines += ["", "| digits de-distilled, held-out loss | float products, int8 base | int8 | fp8 |", "|---|---|---|---|"]
    for seed in SEEDS:
        plain, *others = (row for row in facts["rows"] if row["seed"] == seed)
        cells = [f"{row['val_loss']:.4f} ({row['val_loss'] - plain['val_loss']:+.4f})" for row in others]
        lines.append(f"| seed {seed} | {plain['val_loss']:.4f} +- {plain['val_loss_se']:.4f} | {' | '.join(cells)} |")
    return "\n".join([MARKS[0], "", *lines, "", MARKS[1]])


def run(name: str, out: Path, *settings: str) -> dict:
    """The last row of a finished run of a digits recipe."""
    words = [w for s in (f"run.out={out}", f"train.steps={STEPS[name]}", "train.warmup=20", *settings) for w in ("--set", s)]
    if code := train([f"dedistill:digits/{name}", *words]):
        raise SystemExit(code)
    return json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])


def digits(work: Path) -> dict:
    """Held-out losses. Those with products of codes are compared with the ones without."""
    run("teacher", work / "teacher")
    if not (work / "pairs").exists():
        here = ["--set", f"run.out={work / 'teacher'}", "--set", f"train.steps={STEPS['teacher']}", "--set", "train.warmup=20"]
        pairs.main(["dedistill:digits/teacher", "--out", str(work / "pairs"), "--count", str(PAIRS), *here])
    run("student", work / "student", f"model.path={work / 'teacher' / 'model'}", f"data.path={work / 'pairs'}")
    rows = []
    for seed in SEEDS:
        for matmul, quant in WAYS.items():
            settings = (f"model.path={work / 'student' / 'model'}", f"run.seed={seed}", f"base.matmul={matmul}")
            last = run("dedistill", work / f"{matmul}-{seed}", *settings, f"base.quant={quant}", "validate.every=300")
            found = {key: last[key] for key in ("val_loss", "val_loss_se")}
            rows.append({"seed": seed, "matmul": matmul, **found})
    facts = {"steps": STEPS, "rows": rows, "differences": {}, "within": {}}
    plain, *others = ([r for r in rows if r["matmul"] == matmul] for matmul in WAYS)
    for found in others:
        apart = [b["val_loss"] - a["val_loss"] for a, b in zip(plain, found)]
        facts["differences"][found[0]["matmul"]] = apart
        facts["within"][found[0]["matmul"]] = [abs(d) < WIDTH * a["val_loss_se"] for d, a in zip(apart, plain)]
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="folder of the runs")
    work = parser.parse_args().work
    facts = {"layers": layers(), **(digits(work) if work else {})}
    if work:
        (RESULTS / "products.json").write_text(json.dumps(facts, indent=1) + "\n")
        page = PAGE.read_text()
        PAGE.write_text(re.sub(f"{MARKS[0]}.*?{MARKS[1]}", lambda _: tables(facts), page, flags=re.DOTALL))
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
