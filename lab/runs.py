"""The jobs of the laboratory, each a function of (folder, seed, scale): trained by the trainer, judged by the examiner."""

import contextlib
import json
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import torch
from torch import nn

from dedistill.cli.train import train
from dedistill.data.encode import open_source
from dedistill.evaluation.judges import judge_for
from dedistill.flow.guidance import ClassifierFree
from dedistill.models.model import Model
from dedistill.posthoc.average import average_run
from dedistill.recipe import Recipe, load_recipe
from dedistill.recipe.model_tables import Base
from dedistill.recipe.resolve import resolve
from dedistill.release.merge import merge_adapter
from dedistill.runs.model import last_weights, open_finished
from dedistill.sampling.pairs import make_pairs, teacher_hash
from dedistill.sampling.sampler import Sampling
from lab.scores import Examiner
from lab.tricks import RUNS, Run, Scale
from lab.variance import gradient_variances

RECIPES = Path(__file__).parent.parent / "dedistill" / "recipes" / "digits"
LENGTHS = (8, 12, 24, 48)
"""Tokens that captions of up to 8 are padded to; 12 in training."""
COUPLES_CFG = 1.5
Scores = dict[str, dict[str, float]]
"""By model, then by score."""


@dataclass(frozen=True)
class Seed:
    """One chain of teacher, student and de-distilled models with its own random draws throughout."""

    root: Path
    seed: int
    scale: Scale

    @property
    def folder(self) -> Path:
        return self.root / f"seed{self.seed}"

    @cached_property
    def examiner(self) -> Examiner:
        return _examiner(self.scale)

    def recipe(self, name: str, out: str, *sets: str) -> Recipe:
        """dedistill:digits/NAME in this folder; validated once, at the end."""
        steps = {"STEPS": self.scale.steps, "STARTS": self.scale.starts, "AVERAGED": self.scale.averaged}
        for word, number in steps.items():
            sets = tuple(s.replace(word, str(number)) for s in sets)
        here = (f"run.seed={self.seed}", f"run.out={self.folder / out}", "validate.every=100000", "checkpoint.every=0")
        return load_recipe(RECIPES / f"{name}.toml", [*here, *sets])

    def train(self, recipe: Recipe) -> Recipe:
        """Train or continue; what the trainer says goes to ``log.txt``. Raises KeyboardInterrupt when it was stopped."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "log.txt").open("a") as log, contextlib.redirect_stderr(log):
            if train(recipe, []):
                raise KeyboardInterrupt
        return recipe

    def pairs(self, recipe: Recipe, name: str, *, cfg: float, points: int) -> Path:
        """Pairs of a finished ``recipe``, in this folder."""
        out, model, count = self.folder / name, open_finished(recipe), self.scale.pairs
        same = {"teacher": teacher_hash(model), "count": count, "seed": self.seed, "shard_size": 512}
        make_pairs(
            model, self.examiner.source, out, sampling=Sampling(steps=16, guidance=ClassifierFree(cfg)), points=points, **same
        )
        return out


@cache
def _examiner(scale: Scale) -> Examiner:
    recipe = load_recipe(RECIPES / "dedistill.toml")
    source = open_source(recipe.data)
    return Examiner(recipe, source, judge_for(source), source.prompts(0, scale.prompts), scale.held_out)


def teacher_recipe(lab: Seed) -> Recipe:
    return lab.recipe("teacher", "teacher", f"train.steps={lab.scale.teacher}")


def student_recipe(lab: Seed) -> Recipe:
    paths = f"model.path={lab.folder / 'teacher' / 'model'}", f"data.path={lab.folder / 'pairs'}"
    return lab.recipe("student", "student", *paths, f"train.steps={lab.scale.student}")


def run_recipe(lab: Seed, name: str) -> Recipe:
    run: Run = RUNS[name]
    student = lab.folder / ("student_int4" if run.int4 else "student/model")
    # before the variant's own: a whole table that it sets says its steps itself
    recipe = lab.recipe("dedistill", name, f"model.path={student}", "train.steps=STEPS", "snapshot.every=0", *run.sets)
    if name.startswith(("default", "raised", "ones", "noise")):
        early = recipe.validate_.model_copy(update={"every": lab.scale.starts // 3})
        recipe = resolve(recipe.model_copy(update={"validate_": early}))
    return recipe.model_copy(update={"adapter": None, "base": Base()}) if run.full else recipe


def chain(lab: Seed) -> Scores:
    """Teacher, pairs, student."""
    teacher = lab.train(teacher_recipe(lab))
    lab.pairs(teacher, "pairs", cfg=3, points=4)
    student = lab.train(student_recipe(lab))
    models = {"teacher": open_finished(teacher), "student": open_finished(student)}
    found = {name: lab.examiner.all(model) for name, model in models.items()}
    _write_int4(models["student"], lab.folder / "student_int4")
    return found


@torch.no_grad()
def _write_int4(model: Model, out: Path) -> None:
    """The model with every linear's weight rounded to 15 levels, symmetric, one scale per output row."""
    for module in model.components.denoiser.modules():
        if isinstance(module, nn.Linear):
            scale = module.weight.abs().amax(1, keepdim=True) / 7
            module.weight.copy_((module.weight / scale.clamp(min=1e-12)).round().clamp(-7, 7) * scale)
    out.mkdir(exist_ok=True)
    model.family.save(model.components, out)


def variant(lab: Seed, name: str) -> Scores:
    """One de-distillation."""
    recipe = lab.train(run_recipe(lab, name))
    found = lab.examiner.all(open_finished(recipe))
    rows = map(json.loads, (lab.folder / name / "metrics.jsonl").read_text().splitlines())
    return {name: found | {"early": next(row["val_loss"] for row in rows if "val_loss" in row)}}


def averages(lab: Seed) -> Scores:
    """LERP chains and power-law averages of one run at a constant rate, and its last snapshot."""
    every = lab.scale.averaged // 20
    recipe = lab.recipe(
        "dedistill",
        "averaged",
        f"model.path={lab.folder / 'student/model'}",
        'train={steps=AVERAGED,batch=32,lr=4e-3,schedule="constant",warmup=20}',
        f"snapshot={{every={every},ema=[0.05,0.10]}}",
    )
    lab.train(recipe)
    run = lab.folder / "averaged"
    with (lab.folder / "log.txt").open("a") as log:
        written = average_run(
            run, alphas=(0.2, 0.4, 0.6, 0.9), widths=(0.05, 0.1, 0.15, 0.2), say=lambda line: print(line, file=log)
        )
    files = {"last": last_weights(run)}
    for path in written:
        kind, _, number = path.stem.rpartition("_")
        files[f"{'alpha' if kind.startswith('alpha') else 'power'}_{float(number):g}"] = path
    return {name: lab.examiner.all(open_finished(recipe, path), (2,)) for name, path in files.items()}


def reflow(lab: Seed) -> Scores:
    """Straightened once and twice, and one-step students of the same couples with and without it."""
    teacher = teacher_recipe(lab)
    couples = lab.pairs(teacher, "couples_1", cfg=COUPLES_CFG, points=1)
    steps = lab.scale.reflow
    start = lab.folder / "teacher" / "model"

    def retrain(name: str, out: str, base: Path, pairs: Path, times: int = 1) -> Recipe:
        return lab.train(lab.recipe(name, out, f"model.path={base}", f"data.path={pairs}", f"train.steps={steps * times}"))

    found = {}
    once = retrain("reflow", "reflow_1", start, couples)
    found["reflow_1"] = open_finished(once)
    again = lab.pairs(once, "couples_2", cfg=1, points=1)
    found["reflow_2"] = open_finished(retrain("reflow", "reflow_2", lab.folder / "reflow_1" / "model", again))
    found["distilled_direct"] = open_finished(retrain("student", "distilled_direct", start, couples))
    after = retrain("student", "distilled_after", lab.folder / "reflow_1" / "model", couples)
    found["distilled_after"] = open_finished(after)
    # as many steps as reflow and distilling take together
    found["distilled_longer"] = open_finished(retrain("student", "distilled_longer", start, couples, times=2))
    scores = {name: lab.examiner.paths(model) for name, model in found.items()}
    # the paths that the couples are the ends of
    return scores | {"teacher_guided": lab.examiner.paths(open_finished(teacher), cfg=COUPLES_CFG)}


def distilled_again(lab: Seed) -> Scores:
    """The control of the story: distil the de-distilled model again, and the student longer."""
    base, merged = run_recipe(lab, "base"), lab.folder / "merged"
    if not merged.exists():
        merge_adapter(base, last_weights(lab.folder / "base"), merged, dtype="fp32")
    starts = (merged, merged, lab.folder / "student" / "model")
    found = {}
    for name, start, steps in zip(("again_short", "again_long", "longer"), starts, lab.scale.distilled_again):
        more = f'train={{objective="distill",steps={steps},batch=64,lr=1e-3,schedule="linear",max_grad_norm=1.0}}'
        recipe = lab.recipe("student", name, f"model.path={start}", f"data.path={lab.folder / 'pairs'}", more)
        found[name] = lab.examiner.all(open_finished(lab.train(recipe)))
    return found


def padding(lab: Seed) -> Scores:
    """The same prompts padded to several lengths: what a model sees of padding."""
    models = {"teacher": teacher_recipe(lab), "student": student_recipe(lab)}
    models |= {name: run_recipe(lab, name) for name in ("base", "mask_off")}
    return {
        f"{name}, {length} tokens": lab.examiner.images(open_finished(recipe), 2, length=length)
        for name, recipe in models.items()
        for length in LENGTHS
    }


def variance(lab: Seed) -> Scores:
    """Stratified over independent timesteps at the weights of the finished recipe: how much less they vary."""
    base = run_recipe(lab, "base")
    model = open_finished(base)
    found = {}
    for density in ("beta", "uniform"):
        kinds = [base.timesteps.model_copy(update={"density": density, "stratify": s}) for s in (False, True)]
        recipes = [resolve(base.model_copy(update={"timesteps": _plain(kind)})) for kind in kinds]
        loose, strata = (gradient_variances(model, r, lab.examiner.source, lab.scale.batches) for r in recipes)
        found[f"variance {density}"] = {key: loose[key] / strata[key] for key in loose}
    return found


def _plain(timesteps):
    """Without the parameters of a density that it no longer has."""
    return timesteps if timesteps.density == "beta" else timesteps.model_copy(update={"alpha": None, "beta": None})


SPECIAL = {
    "chain": chain,
    "averages": averages,
    "reflow": reflow,
    "distilled_again": distilled_again,
    "padding": padding,
    "variance": variance,
}
PHASES = (("chain",), ("reflow", "averages", *RUNS), ("distilled_again", "variance", "padding"))
"""Jobs whose inputs the phases before have made."""


def run_job(lab: Seed, name: str) -> Scores:
    return SPECIAL[name](lab) if name in SPECIAL else variant(lab, name)
