"""What the number of processes changes, and what train.exact costs.

python -m benchmarks.processes        about 5 minutes on 2 cores; starts up to 7 processes by torchrun
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks.interleave import RESULTS, ratio
from dedistill.data.encode import open_data
from dedistill.distributed.outside import StopRequests
from dedistill.distributed.world import World
from dedistill.io.atomic import make_folder
from dedistill.models.model import build_model
from dedistill.recipe import load_recipe
from dedistill.recipe.resolve import make_plan
from dedistill.runs.directory import RunDirectory
from dedistill.training.engine import Engine
from dedistill.training.trainer import Trainer

RECIPE = "dedistill:digits/teacher"
STEPS, BATCH = 20, 16
ONLY_TRAINING = ["checkpoint.every=0", "validate.every=1000", "validate.samples=8", "snapshot.every=0"]


def weights(size: int, exact: str, folder: Path) -> dict[str, torch.Tensor]:
    """What ``STEPS`` steps on ``size`` processes end at."""
    out = folder / f"{size}-{exact}"
    settings = [f"run.out={out}", f"train.steps={STEPS}", f"train.batch={BATCH}", "train.warmup=0", f"train.exact={exact}"]
    settings += ONLY_TRAINING
    command = ["torchrun", "--nproc_per_node", str(size), "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    command += ["-m", "dedistill.train", RECIPE, "--cpu", *(a for s in settings for a in ("--set", s))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(command, check=True, env=environment, capture_output=True)
    return load_file(out / "checkpoints" / f"step-{STEPS:08d}" / "trainable.safetensors")


def trainer(folder: Path, *settings: str) -> Trainer:
    """Of a run in ``folder`` that does nothing but train, once it has validated at the start."""
    make_folder(folder)
    plain = [f"run.out={folder}", f"train.batch={BATCH}", "train.warmup=0", "log.every=100000", *ONLY_TRAINING]
    recipe = load_recipe(RECIPE, [*plain, *settings])
    data, run = open_data(recipe, "cpu", print), RunDirectory(recipe)
    model, engine = build_model(recipe), Engine(recipe, World())
    engine.place(model, "cpu")
    return Trainer(recipe, make_plan(recipe), model=model, source=data.source, run=run, engine=engine)


def step_of(made: Trainer) -> Callable[[], dict]:
    """A function that trains one step."""
    rows = made.fit(StopRequests().__enter__(), None)
    return lambda: next(rows)


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        modes = {"whole": [], "single": ["train.micro_batch=1"], "exact": ["train.exact=true"]}
        whole, single, exact = (step_of(trainer(folder / name, *settings)) for name, settings in modes.items())
        cost = {
            "exact over fast, whole batch at once": ratio(whole, exact),
            "exact over fast, one sample at a time": ratio(single, exact),
        }
        alone = {mode: weights(1, mode, folder) for mode in ("false", "true")}
        furthest = {}
        for mode, sizes in (("false", (2, 3, 5, 7)), ("true", (3, 7))):
            for size in sizes:
                other = weights(size, mode, folder)
                furthest[f"{size} processes, exact = {mode}"] = max(
                    float((alone[mode][k] - other[k]).abs().max()) for k in alone[mode]
                )
    setting = f"{RECIPE}, batch {BATCH}, {STEPS} steps, CPU, one thread each; largest difference of a weight to one process"
    result = {"setting": setting, "largest_difference": furthest, "seconds_ratio": cost}
    print(json.dumps(result, indent=1))
    (RESULTS / "processes.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
