"""What is each trick of the method worth? Trains every variant over several seeds and writes docs/lab.md.

python -m lab --quick        # about 10 minutes on 2 cores, 2 seeds: runs/lab/quick/{index.html,lab.md}
python -m lab                # under an hour on 2 cores, 3 seeds: docs/lab.md, its figures, runs/lab/full/index.html

Stop it when you like; run again, it goes on. Each process takes one core.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path

from dedistill.errors import RUN_AGAIN
from lab.tricks import FULL, QUICK, RUNS, Scale

ROOT = Path(__file__).parent.parent
VERSION = 1
"""Of the jobs: results of another one are made again."""
FIGURES = ROOT / "lab" / "results" / "lab.json"


def main() -> int:
    parser = argparse.ArgumentParser("python -m lab", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps and seeds: which way do things point?")
    parser.add_argument("--seeds", type=int, help="how many chains; default 3, quick 2")
    parser.add_argument("--processes", type=int, default=2, help="jobs at a time; default 2")
    parser.add_argument("--report", action="store_true", help="train nothing, write the report of the committed figures again")
    args = parser.parse_args()
    seeds, scale = args.seeds or (2 if args.quick else 3), QUICK if args.quick else FULL
    if seeds < 2:
        parser.error("--seeds: an interval needs at least 2")
    root = Path("runs/lab") / ("quick" if args.quick else "full")
    if args.report:
        found = json.loads(FIGURES.read_text())
    else:
        try:
            found = run_all(root, scale, seeds, args.processes)
        except KeyboardInterrupt:
            print("stopped; run again to go on", file=sys.stderr)
            return RUN_AGAIN
    publish(found, root, committed=not args.quick)
    return 0


def publish(found: dict, root: Path, *, committed: bool) -> None:
    """Print the main table and write the page into ``root``; the report beside it, or with the figures into the project."""
    from lab.page import write_page
    from lab.report import main_table, with_main_table, write_report

    print("\n".join(main_table(found["scores"])))
    if committed:
        FIGURES.write_text(json.dumps(found, indent=1) + "\n")
        page = ROOT / "docs" / "tricks.md"
        page.write_text(with_main_table(page.read_text(), found["scores"]))
    print(f"done: {write_report(found, ROOT / 'docs' if committed else root)}, {write_page(found, root)}", file=sys.stderr)


def run_all(root: Path, scale: Scale, seeds: int, processes: int) -> dict:
    """Every job that has no result yet, phase by phase; returns settings, seconds, and the scores of every seed."""
    from lab.runs import PHASES

    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    results: list[dict[str, dict]] = [{} for _ in range(seeds)]
    total = seeds * sum(map(len, PHASES))
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:

        def start(seed: int, phase: int) -> dict[Future, tuple[int, int]]:
            return {pool.submit(job, root, seed, scale, name): (seed, phase) for name in PHASES[phase]}

        running = {future: at for seed in range(seeds) for future, at in start(seed, 0).items()}
        while running:
            future = next(iter(wait(running, return_when=FIRST_COMPLETED).done))
            seed, phase = running.pop(future)
            try:
                name, result = future.result()
            except BaseException:  # a stopped job is saved; what has not begun need not begin
                pool.shutdown(cancel_futures=True)
                raise
            results[seed][name] = result
            done = sum(map(len, results))
            print(f"{done}/{total} seed {seed} {name}: {result['wall']:.0f} s", file=sys.stderr, flush=True)
            if phase + 1 < len(PHASES) and all(name in results[seed] for name in PHASES[phase]):
                running |= start(seed, phase + 1)
    return {
        "scale": asdict(scale),
        "seeds": seeds,
        "cpu_seconds": round(sum(r["cpu"] for found in results for r in found.values())),
        "wall_seconds": round(sum(r["wall"] for found in results for r in found.values()) / processes),
        "scores": [_by_model(found) for found in results],
    }


def _recipes_hash() -> str:
    texts = [path.read_bytes() for path in sorted((ROOT / "dedistill" / "recipes" / "digits").glob("*.toml"))]
    return hashlib.sha256(b"".join(texts)).hexdigest()


def _by_model(results: dict[str, dict]) -> dict[str, dict]:
    """Scores of all jobs of a seed; a model that several jobs judged has all its scores."""
    found: dict[str, dict] = {}
    for _, result in sorted(results.items()):
        for model, scores in result["scores"].items():
            found.setdefault(model, {}).update(scores)
    return found


def job(root: Path, seed: int, scale: Scale, name: str) -> tuple[str, dict]:
    """Scores and seconds of one job; what is there from the same settings is not made again."""
    from lab.runs import Seed, run_job

    file = root / f"seed{seed}" / "results" / f"{name}.json"
    key = json.dumps([VERSION, _recipes_hash(), asdict(scale), repr(RUNS.get(name))])
    if file.exists() and (known := json.loads(file.read_text()))["key"] == key:
        return name, known
    wall, cpu = time.perf_counter(), time.process_time()
    scores = run_job(Seed(root, seed, scale), name)
    seconds = {"wall": round(time.perf_counter() - wall, 1), "cpu": round(time.process_time() - cpu, 1)}
    from dedistill.io.atomic import make_folder, replace_json

    make_folder(file.parent)
    replace_json(file, found := {"key": key, **seconds, "scores": scores})
    return name, found
