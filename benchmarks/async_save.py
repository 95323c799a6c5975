"""What a checkpoint costs training: written beside it, over written while it stands still. In one process, in turn.

A step here waits for a device, as the thread that trains does, and keeps the interpreter busy for a tenth of its time.

python -m benchmarks.async_save
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.interleave import report
from dedistill.runs.checkpoint import save_checkpoint
from dedistill.training.keeping import AsyncCheckpointWriter, Groups

ROUNDS = 7
STEP, STEPS = 0.02, 400
"""Seconds of a step, and how many: longer than any of the saves takes."""


def train(save: Callable[[], object] = lambda: None) -> float:
    """Seconds that steps take, with a save after the first; beyond those that they take by themselves."""
    start = time.perf_counter()
    for step in range(STEPS):
        busy_until = time.perf_counter() + STEP / 10
        while time.perf_counter() < busy_until:
            pass
        time.sleep(STEP * 9 / 10)
        if step == 0:
            save()
    return time.perf_counter() - start


def state(megabytes: int) -> Groups:
    part = torch.randn(megabytes * 2**20 // 12)
    return {"trainable": {"w": part}, "optimizer": {"w/exp_avg": part + 1, "w/exp_avg_sq": part + 2}}


def lost(groups: Groups, writer: AsyncCheckpointWriter, folder: Path, step: int) -> tuple[float, float]:
    """Seconds lost to a save that is waited for, and to one beside training."""

    def write(number: int) -> Callable[[Groups], object]:
        return lambda tensors: save_checkpoint(folder, number, tensors, {}, keep=2)

    plain = train()
    waited = train(lambda: write(step)(groups)) - plain
    beside = train(lambda: writer.start(groups, write(step + 1))) - plain
    start = time.perf_counter()
    writer.wait()
    assert time.perf_counter() - start < STEP, "the steps were over before the save"
    return waited, beside


def main() -> None:
    torch.set_num_threads(1)
    rows = {}
    for megabytes in (64, 256):
        with tempfile.TemporaryDirectory() as folder:
            groups, writer, checkpoints = state(megabytes), AsyncCheckpointWriter(), Path(folder) / "checkpoints"
            lost(groups, writer, checkpoints, 0)  # the first save of a run gets the memory for its copies
            pairs = [lost(groups, writer, checkpoints, 2 * i) for i in range(1, ROUNDS + 1)]
            writer.close()
        ratios = [beside / waited for waited, beside in pairs]
        waited, beside = (statistics.median(column) for column in zip(*pairs))
        name = f"{megabytes} MiB of weights and moments"
        numbers = {"median": statistics.median(ratios), "least": min(ratios), "greatest": max(ratios)}
        rows[name] = {key: round(value, 3) for key, value in numbers.items()}
        print(f"{name}: {waited:.2f} s lost to a save that is waited for, {beside:.2f} s to one beside")
    report(
        "async_save",
        rows,
        "time lost to a save beside training over that lost to one that is waited for",
    )


if __name__ == "__main__":
    main()
