"""Reflow of a small diffusion model of digits from three starts, and its distillation to one step: docs/reflow.md's numbers.

python -m lab.ladder                         # 3 seeds, about 6 minutes of one core each: lab/results/ladder.json, the figure
python -m lab.ladder --losses                # the same with other densities and losses: lab/results/ladder_losses.json
python -m lab.ladder --start models/ladder        # only the random network that dedistill chain lab/ladder begins with

Stop it when you like; run again, it goes on.
"""

import argparse
import contextlib
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from dedistill.cli.train import train
from dedistill.data.digits import load_digits
from dedistill.data.pairs import PairSource
from dedistill.evaluation.judges import DigitJudge
from dedistill.evaluation.meters import path_numbers
from dedistill.flow.path import flow_loss
from dedistill.flow.solvers import sigma_grid
from dedistill.io.atomic import replace_json
from dedistill.models.model import Model, build_model
from dedistill.objectives.base import objective_for
from dedistill.recipe import Recipe, load_recipe
from dedistill.runs.model import open_finished
from dedistill.sampling.pairs import make_pairs, teacher_hash
from dedistill.sampling.sampler import Sampling, start_noise, trajectories
from lab.ladder.report import OF_LOSSES, RESULTS, write_report
from lab.ladder.start import write_start

HERE = Path(__file__).parent
Settings = dict[str, tuple[str, ...]]
STARTS: Settings = {
    "bridge": (),
    "naive": ("model.prediction=velocity",),
    "instaflow": ("model.prediction=negative_velocity",),
    "rectified": ("train.objective=rectified_diffusion",),
}
U_SHAPED, HUBER = "timesteps.density=u_shaped", "train.huber=0.00054"
LOSSES: Settings = {"bridge": (), "u_shaped": (U_SHAPED,), "huber": (HUBER,), "both": (U_SHAPED, HUBER)}
"""Reflows from the bridge alone, by what Lee et al. (arXiv 2405.20320) would change."""
ONE_STEPS: Settings = {"onestep": (), "onestep_huber": (HUBER,)}
PAIRS, PROMPTS, MANY = 1024, 256, 32
LONGER = 3, 6
"""Times as many pairs, and steps, of one more reflow, which the first seed alone can afford."""
HALF = 0.5
"""So long is the ladder of ``LOSSES``."""
FEW = (1, 2, 4, 8)


@dataclass(frozen=True)
class Ladder:
    """All stages of one seed, each in its own folder. reflows, of which "bridge" goes on to ``one_steps``: settings by name."""

    folder: Path
    seed: int
    reflows: Settings = field(default_factory=lambda: STARTS)
    one_steps: Settings = field(default_factory=lambda: {"onestep": ()})
    length: float = 1.0
    """Of all its stages, steps and pairs, as a share of what the recipes say."""

    def recipe(self, name: str, out: str, *sets: str) -> Recipe:
        places = (f"run.seed={self.seed}", f"run.out={self.folder / out}")
        steps = load_recipe(HERE / f"{name}.toml").train.steps
        return load_recipe(HERE / f"{name}.toml", [*places, f"train.steps={round(self.length * steps)}", *sets])

    def train(self, recipe: Recipe) -> Recipe:
        with (self.folder / "log.txt").open("a") as log, contextlib.redirect_stderr(log):
            if train(recipe, []):
                raise KeyboardInterrupt
        return recipe

    def pairs(self, recipe: Recipe, name: str, sampling: Sampling, count: int = PAIRS) -> Path:
        out, model = self.folder / name, open_finished(recipe)
        same = {"teacher": teacher_hash(model), "count": round(self.length * count), "seed": self.seed, "shard_size": PAIRS}
        make_pairs(model, load_digits(0.0), out, sampling=sampling, points=1, **same)
        return out

    def run(self) -> dict[str, dict[str, float]]:
        """Scores of every model by name."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (start := self.folder / "start").exists():
            write_start(start, self.seed)
        base = self.train(self.base)
        own = self.pairs(base, "pairs", Sampling(solver="heun", steps=12))
        places = f"model.path={self.folder / 'base' / 'model'}", f"data.path={own}"
        runs = {name: self.recipe("reflow", name, *places, *sets) for name, sets in self.reflows.items()}
        scores = {name: {"first_loss": first_loss(recipe)} for name, recipe in runs.items()}
        found = {"base": open_finished(base)} | {name: open_finished(self.train(recipe)) for name, recipe in runs.items()}
        new = self.pairs(runs["bridge"], "pairs2", Sampling(solver="heun", steps=8))
        places = f"model.path={self.folder / 'bridge' / 'model'}", f"data.path={new}"
        for name, sets in self.one_steps.items():
            found[name] = open_finished(self.train(self.recipe("onestep", name, *places, *sets)))
        for name in {"bridge", "naive", "instaflow"} & runs.keys():
            scores[name]["near_noise"] = near_noise(self.folder / name)
        ends: dict[str, np.ndarray] = {}
        for name, model in found.items():
            scores[name] = scores.get(name, {}) | score(model, ends, name, "bridge" if name in self.one_steps else name)
        return scores

    @property
    def base(self) -> Recipe:
        return self.recipe("base", "base", f"model.path={self.folder / 'start'}")

    def longer(self) -> dict[str, float]:
        """Scores of a longer reflow on more pairs, after ``run``."""
        pairs = self.pairs(self.base, "pairs_longer", Sampling(solver="heun", steps=12), LONGER[0] * PAIRS)
        places = f"model.path={self.folder / 'base' / 'model'}", f"data.path={pairs}"
        steps = LONGER[1] * self.recipe("reflow", "longer", *places).train.steps
        recipe = self.recipe("reflow", "longer", *places, f"train.steps={steps}", "train.lr=2e-3")
        ends: dict[str, np.ndarray] = {}
        score(open_finished(self.base), ends, "base", "base")
        return score(open_finished(self.train(recipe)), ends, "longer", "longer")


def near_noise(run: Path) -> float:
    """Mean training loss in the highest eighth of sigma, over the last 50 steps."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines()[-50:])
    return float(np.mean([row["sigma_loss"][-1] for row in rows if row["sigma_loss"][-1] is not None]))


@torch.no_grad()
def first_loss(recipe: Recipe) -> float:
    """Of the velocity on held-out pairs before the first step, over that of predicting nothing; sigmas even."""
    model, pairs = build_model(recipe), PairSource(Path(recipe.data.path or ""))
    plain = recipe.model_copy(update={"train": recipe.train.model_copy(update={"objective": "reflow"})})
    (batch,) = objective_for(plain, pairs, model.shift).validation_batches(256, 256)
    v = model.velocity(batch.noisy, batch.sigma, batch.conditioning(model))
    return float(flow_loss(v, batch.target).mean() / batch.target.square().mean())


def score(model: Model, ends: dict[str, np.ndarray], name: str, taught_by: str) -> dict[str, float]:
    """Of images of one noise: straightness, squared errors of few steps as shares of the path's length, Frechet distances.

    ends: those of many steps of the models before, by name; this one's are added. Errors are held to those of ``taught_by``.
    """
    source = load_digits(0.0)
    judge, prompts = DigitJudge(source), source.prompts(0, PROMPTS)
    noise = start_noise(0, PROMPTS, model.components.sample_shape)

    def states(steps: int) -> list[torch.Tensor]:
        chunks = list(trajectories(model, prompts, noise, Sampling(steps=steps)))
        return [torch.cat(parts) for parts in zip(*chunks)]

    path = states(MANY)
    chord, curvature, _, end = path_numbers(path, sigma_grid(MANY, model.grid_shift))
    ends[name] = end
    target = ends[taught_by]
    found = {
        "straightness": float((curvature @ -np.diff(sigma_grid(MANY, model.grid_shift))).sum() / chord.sum()),
        f"frechet_{MANY}": judge.numbers(path[-1])["frechet"],
    }
    length = float(((noise.flatten(1).double().numpy() - target) ** 2).mean())
    for steps in FEW:
        made = states(steps)[-1]
        found[f"frechet_{steps}"] = judge.numbers(made)["frechet"]
        found[f"error_{steps}"] = float(((made.flatten(1).double().numpy() - target) ** 2).mean()) / length
        found[f"from_base_{steps}"] = float(((made.flatten(1).double().numpy() - ends["base"]) ** 2).mean()) / length
    return found


def main() -> int:
    parser = argparse.ArgumentParser("python -m lab.ladder", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the ladders; default 0 1 2")
    parser.add_argument("--losses", action="store_true", help="other densities and losses in place of other starts")
    parser.add_argument("--start", type=Path, help="only write the random network of seed 0 there")
    parser.add_argument("--report", action="store_true", help="train nothing, draw the committed figures again")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.start:
        write_start(args.start, 0)
        return 0
    if not args.report:
        climb(args.seeds, losses=args.losses)
    print(f"done: {', '.join(map(str, write_report()))}", file=sys.stderr)
    return 0


def climb(seeds: list[int], *, losses: bool) -> None:
    """Every ladder that is not climbed yet; then the results of all."""
    found = []
    for seed in seeds:
        folder = Path("runs/ladder_losses" if losses else "runs/ladder") / f"seed{seed}"
        file, began = folder / "scores.json", time.process_time()
        if not file.exists():
            ladder = Ladder(folder, seed, LOSSES, ONE_STEPS, HALF) if losses else Ladder(folder, seed)
            replace_json(file, {"scores": ladder.run(), "cpu_seconds": round(time.process_time() - began)})
        found.append(json.loads(file.read_text())["scores"])
        print(f"seed {seed}: {json.dumps(found[-1], indent=1)}", file=sys.stderr, flush=True)
    if losses:
        return replace_json(OF_LOSSES, {"seeds": found})
    file = Path("runs/ladder/longer.json")
    if not file.exists():
        replace_json(file, Ladder(Path("runs/ladder") / f"seed{seeds[0]}", seeds[0]).longer())
    replace_json(RESULTS, {"seeds": found, "longer": json.loads(file.read_text())})
