"""How much of a training step from the cache is waiting for data, with and without drawing it ahead.

python -m benchmarks.data_wait
"""

import json
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.interleave import RESULTS
from dedistill.models.flux.tiny import write_tiny_flux
from dedistill.train import main as train
from dedistill.training import trainer as loop
from dedistill.training.trainer import ahead

IMAGES, STEPS, PAIRS = 96, 41, 3
RECIPE = """
[run]
name = "data-wait"
out = "{folder}/run"
[model]
family = "flux"
path = "{folder}/model"
[adapter]
kind = "lokr"
[[adapter.targets]]
preset = "attention"
[data]
source = "pictures"
cache = "{folder}/cache"
resolutions = [128, 192]
[[data.sets]]
path = "{folder}/images"
[train]
steps = {steps}
batch = 8
micro_batch = 2
lr = 1e-4
[log]
every = 1000
"""


def prepare(folder: Path) -> Path:
    """A tiny FLUX, images of two shapes with captions of 80 tokens, and the recipe."""
    write_tiny_flux(folder / "model")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(IMAGES):
        size = (256, 208, 3) if i % 2 else (208, 256, 3)
        Image.fromarray(rng.integers(0, 255, size, dtype=np.uint8)).save(folder / "images" / f"{i:03d}.png")
        words = rng.choice(["black", "cat", "dog", "house", "moon", "river", "sky", "tree"], 79)
        (folder / "images" / f"{i:03d}.txt").write_text(" ".join(words))
    recipe = folder / "recipe.toml"
    recipe.write_text(RECIPE.format(folder=folder, steps=STEPS))
    return recipe


def share(recipe: Path, out: Path) -> tuple[float, float]:
    """(percent of the time spent waiting for data, seconds per step), without the first step."""
    if train([str(recipe), "--set", f"run.out={out}"]) != 0:
        raise SystemExit("the run failed")
    last = json.loads((out / "timings.jsonl").read_text().splitlines()[-1])
    return 100 * last["data_wait_s"] / last["seconds"], last["seconds"] / (STEPS - 1)


def main() -> None:
    torch.set_num_threads(1)
    ways = {"drawn ahead": ahead, "drawn when needed": lambda tasks: tasks}
    found = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as temporary:
        recipe = prepare(Path(temporary))
        for pair in range(PAIRS):
            for name, way in ways.items():
                loop.ahead = way
                found[name].append(share(recipe, Path(temporary) / f"run-{pair}-{way.__name__.strip('<>')}"))
    rows = {
        name: {
            "percent_waiting": {
                "median": round(statistics.median(s for s, _ in values), 2),
                "least": round(min(s for s, _ in values), 2),
                "greatest": round(max(s for s, _ in values), 2),
            },
            "seconds_per_step": round(statistics.median(s for _, s in values), 4),
        }
        for name, values in found.items()
    }
    setting = f"tiny FLUX, one CPU thread for the network, batch 8 = 4 x 2, {STEPS - 1} steps, {PAIRS} runs each, in turn"
    print(json.dumps(rows, indent=1))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "data_wait.json").write_text(json.dumps({"setting": setting, "waiting": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
