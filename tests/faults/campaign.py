"""Faults on purpose, by the hundred: what ``tests/faults`` does in small. Writes the first table of docs/reliability.md.

python -m tests.faults.campaign [--kills 200] [--kills-of-two 40] [--states 100] [--flips 500] [--damages 200] [--shards 400]
[--recipes 2000] [--signals 60] [--stuck 30]
"""

import argparse
import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.extend(  # as pytest finds helpers
    str(Path(__file__).parents[1] / folder) for folder in (".", "distributed", "faults", "runs", "training")
)
os.environ["OMP_NUM_THREADS"] = "1"

import campaign_kinds as kinds
import campaign_running as running
import campaign_worlds as worlds
import torch
from campaign_kinds import Row
from tiny_recipes import ADAPTER, TEACHER

from dedistill.train import main as train

ROOT = Path(__file__).parents[2]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m tests.faults.campaign", description=__doc__)
    for name, number in (("kills", 200), ("kills-of-two", 40), ("states", 100), ("flips", 500), ("damages", 200)):
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--shards", type=int, default=400)
    parser.add_argument("--recipes", type=int, default=2000)
    parser.add_argument("--signals", type=int, default=60)
    parser.add_argument("--stuck", type=int, default=30)
    parser.add_argument("--only", nargs="*", default=None, help="parts to run, by the names of their functions; prints only")
    return parser


def write(rows: list[Row], command: str, seconds: float, file: Path) -> None:
    lines = ["# Reliability: faults injected, and what came of them", ""]
    lines += ["All figures are of one run of", "", f"    {command}", ""]
    lines += [
        f"on {os.cpu_count()} CPU cores, torch {torch.__version__}, in {seconds / 60:.0f} minutes, with a tiny network: what",
        "is tested is the way of saving, loading and looking, which is the same for any size. `tests/faults` does the same",
        "in small with every run of the tests. A power loss is replayed from the record of all operations on files: what was",
        "not synced may be missing, zeroed or cut, and any un-synced rename or removal undone.",
        "Runs are compared bit for bit: journal, snapshots, weights, optimizer. That this comparison fails for a run continued",
        "from its weights alone, and for each saved field that is left out, is tested, too (`tests/faults/test_oracle.py`).",
        "",
        "| Fault | Injected | Result |",
        "| --- | --- | --- |",
    ]
    lines += [f"| {fault} | {often} | {'' if good else '**FAILED** '}{result} |" for fault, often, result, good in rows]
    by_hand = file.read_text().partition("\n## ")[2]
    file.write_text("\n".join(lines) + f"\n\n## {by_hand}")


def main() -> int:
    args = _parser().parse_args()
    torch.set_num_threads(1)
    parts: list[tuple[str, Callable[[Path, Path], Row]]] = [
        ("kills", lambda r, f: kinds.kills(r, f, args.kills, 1)),
        ("kills_of_two", lambda r, f: kinds.kills(r, f, args.kills_of_two, 2)),
        ("crash_points", kinds.crash_points),
        ("power_loss", kinds.power_loss),
        ("power_loss_of_a_run", lambda r, f: kinds.power_loss_of_a_run(r, f, args.states)),
        ("full_disk", kinds.full_disk),
        ("flips", lambda r, f: kinds.flips(r, f, args.flips)),
        ("damages", lambda r, f: kinds.damages(r, f, args.damages)),
        ("worlds", worlds.worlds),
        ("splits", worlds.splits),
        ("traffic", worlds.traffic),
        ("beside", worlds.beside),
        ("not_finite", kinds.not_finite),
        ("bad_steps", running.bad_steps),
        ("no_effect", running.no_effect),
        ("signals", lambda r, f: running.signals(r, f, args.signals)),
        ("stuck", lambda r, f: running.stuck(r, f, args.stuck)),
        ("logging", running.logging),
        ("samples", kinds.samples),
        ("shards", lambda r, f: kinds.shards(r, f, args.shards)),
        ("recipes", lambda r, f: kinds.recipes(r, f, args.recipes)),
    ]
    start, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "teacher.toml").write_text(TEACHER.format(out=root, steps=20))
        recipe = root / "recipe.toml"
        recipe.write_text(ADAPTER.format(out=root, base=root / "teacher" / "model"))
        said = open(root / "said", "w")  # noqa: SIM115 - as long as the process
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            assert train([str(root / "teacher.toml")]) == 0
        for name, part in parts:
            if args.only is None or name in args.only:
                (root / name).mkdir()
                with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
                    rows.append(part(recipe, root / name))
                print(
                    f"{time.monotonic() - start:5.0f} s  {'ok    ' if rows[-1][-1] else 'FAILED'}",
                    *rows[-1][:-1],
                    sep="  ",
                    flush=True,
                )
                shutil.rmtree(root / name)
    if args.only is None:
        write(
            rows,
            " ".join(["python -m tests.faults.campaign", *sys.argv[1:]]),
            time.monotonic() - start,
            ROOT / "docs" / "reliability.md",
        )
    return 0 if all(good for *_, good in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
