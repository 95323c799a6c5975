"""What the number of processes changes, what travels between them, and what a save costs training.

Like ``campaign_kinds``: every function gives one row of docs/reliability.md.
"""

import json
import statistics
from pathlib import Path

import numpy as np
import test_world
import torch
from campaign_kinds import Row
from ranks import run_ranks
from safetensors.torch import load_file

from benchmarks.async_save import lost, state
from dedistill.data.encode import open_data
from dedistill.objectives.base import objective_for
from dedistill.recipe import load_recipe
from dedistill.training.keeping import AsyncCheckpointWriter

CHAINS = ((2, 1, 3), (1, 2, 1), (5, 7))
STEPS = 12


def _chain(recipe: Path, out: Path, sizes: tuple[int, ...], *settings: str) -> Path:
    """One run whose steps fall to as many processes as ``sizes`` says, one after the other."""
    for i, size in enumerate(sizes):
        test_world.train(size, recipe, out, *settings, f"train.steps={STEPS * (i + 1) // len(sizes)}")
    return out


def _rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def worlds(recipe: Path, folder: Path) -> Row:
    settings = (*test_world.FEW, "train.batch=16", "train.schedule=constant", "log.every=1")
    different, furthest, asked = 0, 0.0, 0
    for exact in ("true", "false"):
        mode = (*settings, f"train.exact={exact}")
        alone = _chain(recipe, folder / f"alone-{exact}", (1,), *mode)
        for sizes in CHAINS:
            run = _chain(recipe, folder / f"{sizes}-{exact}", sizes, *mode)
            whole, chain = test_world.saved(alone), test_world.saved(run)
            if exact == "true":
                equal = (alone / "metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()
                different += not (equal and test_world.same(whole, chain))
            furthest = max(furthest, test_world.furthest(whole, chain)) if exact == "false" else furthest
            told = [[(row["step"], row["lr"], row.get("sigma_mean")) for row in _rows(r)] for r in (alone, run)]
            asked += told[0] != told[1]
    alike = _questions(recipe)
    return (
        "another number of processes after each stop: " + ", ".join("-".join(map(str, chain)) for chain in CHAINS),
        f"{2 * len(CHAINS)} runs of {STEPS} steps of 16 samples, dealt unevenly; {alike} questions to 2, 3, 5 and 7 processes",
        "samples, noise, sigmas, targets or captions other than those of one process: 0; runs with another sigma or "
        f"learning rate: {asked}; with train.exact, runs that differ in any bit of weights or metrics: {different}; "
        f"without, largest difference of a weight {furthest:.1e}",
        asked == different == 0 and furthest < 1e-4,
    )


def _questions(recipe_file: Path) -> int:
    """How often the questions of all ranks together were those of one process. Raises AssertionError when they were not."""
    recipe = load_recipe(recipe_file, ["train.batch=16"])
    objective = objective_for(recipe, open_data(recipe, "cpu", print).source, lambda shape: 1.0)
    count = 0
    for step in range(8):
        whole = objective.noisy_batch(step, np.arange(16))
        for size in (2, 3, 5, 7):
            seen = []
            for rank in range(size):
                for positions in objective.share(step, 2, test_world.one_of(rank, size))[0]:
                    task = objective.noisy_batch(step, positions)
                    seen += positions.tolist()
                    assert task.names == [whole.names[p] for p in positions] and task.captions == [
                        whole.captions[p] for p in positions
                    ]
                    for part in ("noisy", "sigma", "target"):
                        assert torch.equal(getattr(task, part), getattr(whole, part)[positions])
            assert sorted(seen) == list(range(16))
            count += 1
    return count


def splits(recipe: Path, folder: Path) -> Row:
    found = {}
    for size in (1, 2, 3, 4):
        file = folder / f"{size}.safetensors"
        given = (recipe, file, "base.quant=none", "train.micro_batch=2", f"run.out={folder / 'run'}")
        assert run_ranks(size, test_world._gradients, *given, said=folder / "said") == [0] * size
        found[size] = load_file(file)
    largest = max(float(g.abs().max()) for g in found[1].values())
    apart = max(test_world.furthest(found[1], found[size]) for size in (2, 3, 4)) / largest
    return (
        "one batch as 1 process x 4 micro-batches, 2 x 2, 3 unevenly, 4 x 1",
        "one gradient in float64",
        f"largest difference {apart:.0e} of the largest entry",
        apart < 1e-12,
    )


def traffic(recipe: Path, folder: Path) -> Row:
    steps, per_step = 3, []
    for exact in ("false", "true"):
        out, notes = folder / exact, folder / f"moved-{exact}"
        given = test_world.arguments(recipe, out, f"train.exact={exact}", f"train.steps={steps}")
        assert run_ranks(2, test_world._counted, given, notes, said=folder / "said") == [0, 0]
        moved = json.loads(notes.with_suffix(".0").read_text())
        trained = json.loads((out / "plan.json").read_text())["effects"]["trained_parameters"]
        per_step.append(sum(size for name, size, _ in moved if name == "all_reduce") / steps / trained)
    fast, exactly = per_step
    return (
        "bytes that travel per step, whole bases (DDP)",
        "every collective of 3 steps on 2 processes, counted",
        f"{fast:.2f} bytes per trained parameter, {exactly:.2f} with train.exact; nothing of the base",
        fast == 4 and 8 <= exactly < 8.1,
    )


def beside(_: Path, folder: Path) -> Row:
    groups, writer = state(256), AsyncCheckpointWriter()
    lost(groups, writer, folder / "checkpoints", 0)  # the first save of a run gets the memory for its copies
    pairs = [lost(groups, writer, folder / "checkpoints", 2 * i) for i in range(1, 8)]
    writer.close()
    ratios = [asynchronous / waited for waited, asynchronous in pairs]
    median = statistics.median(ratios)
    return (
        "time lost to a save beside training",
        f"256 MiB of weights and moments, {len(pairs)} times, interleaved with saves that are waited for",
        f"{median:.0%} of what one costs that is waited for (median; {min(ratios):.0%} to {max(ratios):.0%})",
        median <= 0.1,
    )
