"""What ``base.matmul = "int8"`` costs in quality: digits de-distilled with it and without, on the same seeds.

python -m benchmarks.int8_products --work /tmp/int8-products      about 8 minutes on 2 cores; run again to continue

A teacher, its student and three de-distillations of each arithmetic, all shorter than the demo's.
"""

import argparse
import json
from pathlib import Path

from benchmarks.interleave import RESULTS
from dedistill.cli import pairs
from dedistill.train import main as train

SEEDS = (0, 1, 2)
STEPS = {"teacher": 500, "student": 250, "dedistill": 300}
PAIRS = 768
WIDTH = 1.96


def run(name: str, out: Path, *settings: str) -> dict:
    """The last row of a finished run of a digits recipe."""
    words = [w for s in (f"run.out={out}", f"train.steps={STEPS[name]}", "train.warmup=20", *settings) for w in ("--set", s)]
    if code := train([f"dedistill:digits/{name}", *words]):
        raise SystemExit(code)
    return json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs")
    work = parser.parse_args().work
    run("teacher", work / "teacher")
    if not (work / "pairs").exists():
        here = ["--set", f"run.out={work / 'teacher'}", "--set", f"train.steps={STEPS['teacher']}", "--set", "train.warmup=20"]
        pairs.main(["dedistill:digits/teacher", "--out", str(work / "pairs"), "--count", str(PAIRS), *here])
    run("student", work / "student", f"model.path={work / 'teacher' / 'model'}", f"data.path={work / 'pairs'}")
    rows = []
    for seed in SEEDS:
        for matmul in ("float", "int8"):
            settings = (f"model.path={work / 'student' / 'model'}", f"run.seed={seed}", f"base.matmul={matmul}")
            last = run("dedistill", work / f"{matmul}-{seed}", *settings, "validate.every=300")
            found = {key: last[key] for key in ("val_loss", "val_loss_se")}
            rows.append({"seed": seed, "matmul": matmul, **found})
    plain, ours = ([r for r in rows if r["matmul"] == matmul] for matmul in ("float", "int8"))
    facts = {
        "steps": STEPS,
        "rows": rows,
        "differences": [b["val_loss"] - a["val_loss"] for a, b in zip(plain, ours)],
        "within": [abs(b["val_loss"] - a["val_loss"]) < WIDTH * a["val_loss_se"] for a, b in zip(plain, ours)],
    }
    (RESULTS / "int8_products.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
