"""xdiffusion's FLUX of MNIST, whole, for a few hundred steps of small batches: its loss falls, and its author's own prompts
become digits.

python -m lab.mnist_flux        half an hour of one core; writes lab/results/mnist_flux.json and docs/images/mnist_flux.png
"""

import json
import sys
from pathlib import Path

import numpy as np

from dedistill.cli.main import main as command
from dedistill.data.digits import load_mnist
from dedistill.evaluation.judges import DigitJudge
from dedistill.flow.guidance import guider_of
from dedistill.recipe import load_recipe
from dedistill.runs.model import open_finished
from dedistill.sampling.images import as_image, contact_sheet
from dedistill.sampling.sampler import Sampling, sample, start_noise

RECIPE = "dedistill:mnist_flux"
STEPS, SPAN = 400, 25
SETTINGS = {"run.out": "runs/mnist_flux_small", "train.steps": STEPS, "train.batch": 16, "model.text_length": 16}
SETTINGS |= {"validate.every": 50, "validate.samples": 64, "checkpoint.every": 100}
"""What is smaller than in the recipe; the network is not."""
GRID = """
3 5 six 5 six 9 six four
5 zero eight one six 9 1 three
two 2 8 8 zero six seven 5
4 6 0 3 three 6 six four
one 5 nine 2 5 6 2 three
six four 0 4 one 8 eight five
0 8 5 two four nine seven 1
seven four four 2 eight 9 8 4
"""
"""The prompts of the sheet that the author shows (swookey-thinky/xdiffusion, docs/image/flux.md)."""
CFGS = (1.0, 3.0)
SAMPLER_STEPS = 12
ROOT = Path(__file__).parent.parent
RESULTS, SHEET = ROOT / "lab" / "results" / "mnist_flux.json", ROOT / "docs" / "images" / "mnist_flux.png"


def main() -> int:
    settings = [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")]
    if code := command(["train", RECIPE, *settings]):
        return code
    recipe = load_recipe(RECIPE, settings[1::2])
    rows = [json.loads(line) for line in (Path(recipe.run.out) / "metrics.jsonl").read_text().splitlines()]
    model, judge = open_finished(recipe), DigitJudge(load_mnist(None, 0.0))
    lines = [line.split() for line in GRID.split("\n") if line]
    prompts = [word for line in lines for word in line]
    noise, right = start_noise(0, len(prompts), model.components.sample_shape), {}
    for cfg in CFGS:
        images = sample(model, prompts, noise, Sampling(steps=SAMPLER_STEPS, guidance=guider_of("cfg", cfg)))
        right[f"{cfg:g}"] = float(judge.correct(images, prompts).mean())
        pictures = iter(map(as_image, images))
        sheet = [(" ".join(line), [next(pictures) for _ in line]) for line in lines]
    title = f"mnist_flux, {STEPS} steps of {recipe.train.batch}: CFG {cfg:g}"
    contact_sheet(sheet, [""] * len(lines[0]), title=title, scale=2).save(SHEET)
    losses = np.array([row["loss"] for row in rows])
    found = {
        "settings": SETTINGS,
        "loss": [round(float(part.mean()), 4) for part in np.split(losses, len(losses) // SPAN)],
        "held_out": {row["step"]: round(row["val_loss"], 4) for row in rows if "val_loss" in row},
        "right": right,
        "right_of_real_digits": judge.held_out_accuracy,
    }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
