"""Whole runs on this machine's GPU: straight, stopped and continued, exact, by torchrun, a rehearsal; and one on its CPU.

python -m benchmarks.gpu_runs --out runs.json --work /tmp/gpu-runs

All start at once: what is compared are their weights and losses, never their times.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

RECIPE = "dedistill:digits/teacher"
STEPS = 150
SHORT = [f"train.steps={STEPS}", "train.warmup=10", "validate.every=100", "checkpoint.every=50", "validate.samples=64"]
FEW = ("train.batch=8", "train.steps=50")
RUN_AGAIN = 75


def train(
    out: Path, *settings: str, cpu: bool = False, stop_at: int | None = None, launcher: tuple[str, ...] = ("-m",)
) -> dict:
    """One run to its end; with ``stop_at``, stopped by SIGTERM after that step and started again."""
    words = [w for s in (f"run.out='{out}'", *SHORT, *settings) for w in ("--set", s)]
    command = [sys.executable, *launcher, "dedistill.train", RECIPE, *words]
    env = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if cpu else {})
    starts, begin = 0, time.perf_counter()
    log = out.with_suffix(".log")
    while True:
        starts += 1
        with log.open("a") as stream:
            process = subprocess.Popen(command, env=env, stdout=stream, stderr=stream)
            if stop_at and starts == 1:
                stop_after(process, out / "metrics.jsonl", stop_at)
            code = process.wait()
        if code != RUN_AGAIN or starts > 3:
            break
    found = {"code": code, "starts": starts, "seconds": time.perf_counter() - begin}
    if code:
        return found | {"log": log.read_text()[-1500:]}
    rows = [json.loads(r) for r in (out / "metrics.jsonl").read_text().splitlines()]
    return found | {"loss_last_50": float(np.mean([r["loss"] for r in rows[-50:]])), "rows": len(rows)}


def stop_after(process: subprocess.Popen, metrics: Path, step: int) -> None:
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= step):
        time.sleep(0.02)
    process.terminate()


def weights(out: Path) -> dict[str, np.ndarray]:
    newest = sorted((out / "checkpoints").glob("*/trainable.safetensors"))[-1]
    return load_file(newest)


def difference(a: Path, b: Path) -> dict:
    one, other = weights(a), weights(b)
    unequal = [name for name in one if not np.array_equal(one[name], other[name])]
    far = np.sqrt(
        sum(np.sum((one[n].astype(float) - other[n]) ** 2) for n in one) / sum(np.sum(one[n].astype(float) ** 2) for n in one)
    )
    return {"tensors": len(one), "not_bit_equal": len(unequal), "relative": float(far)}


def rehearse(out: Path, *settings: str) -> dict:
    """The 24 GB recipe of FLUX.1 schnell on two photographs."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    folder = out / "images"
    folder.mkdir(parents=True)
    for name, pixels in zip(("china", "flower"), load_sample_images().images):
        Image.fromarray(pixels).resize((1600, 1200)).save(folder / f"{name}.jpg")
        (folder / f"{name}.txt").write_text("a photo")
    words = ["--rehearse", "--set", f"data.sets=[{{path='{folder}'}}]", "--set", f"run.out='{out}/run'"]
    words += [word for setting in settings for word in ("--set", setting)]
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "dedistill.train", "dedistill:flux_schnell_24gb", *words], capture_output=True, text=True
    )
    return {"code": done.returncode, "seconds": time.perf_counter() - begin, "said": done.stderr[-2500:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.work.mkdir(parents=True)
    at = lambda name: args.work / name  # noqa: E731
    exact, torchrun = "train.exact=true", ("-m", "torch.distributed.run", "--nproc-per-node=1", "--master-port=29555", "-m")
    jobs = {
        "straight": lambda: train(at("straight")),
        "again": lambda: train(at("again")),
        "stopped": lambda: train(at("stopped"), stop_at=60),
        "exact": lambda: train(at("exact"), exact, *FEW),
        "exact stopped": lambda: train(at("exact-stopped"), exact, *FEW, stop_at=25),
        "bf16": lambda: train(at("bf16"), "train.precision='bf16'"),
        "torchrun": lambda: train(at("torchrun"), launcher=torchrun),
        "cpu": lambda: train(at("cpu"), cpu=True),
        "rehearsal": lambda: rehearse(at("rehearsal")),
        "rehearsal, int8 products and swap": lambda: rehearse(
            at("rehearsal-switches"), "base.matmul='int8'", "base.swap=3", "train.gradient_checkpointing=true"
        ),
    }
    with ThreadPoolExecutor(len(jobs)) as pool:
        futures = {name: pool.submit(job) for name, job in jobs.items()}
        facts: dict = {"runs": {name: future.result() for name, future in futures.items()}, "differences": {}}
    pairs = [
        ("straight", "again"),
        ("straight", "stopped"),
        ("exact", "exact-stopped"),
        ("straight", "torchrun"),
        ("straight", "cpu"),
    ]
    for a, b in pairs:
        try:
            facts["differences"][f"{a} / {b}"] = difference(at(a), at(b))
        except (OSError, IndexError, KeyError) as e:
            facts["differences"][f"{a} / {b}"] = f"{type(e).__name__}: {e}"
    args.out.write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
