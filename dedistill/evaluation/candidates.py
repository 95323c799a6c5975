"""What a sweep can compare: the base of a run, its last weights, its post-hoc averages."""

import hashlib
import json
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dedistill.data.encode import open_data
from dedistill.data.source import Source
from dedistill.errors import UserError
from dedistill.evaluation.judges import ClipJudge, DigitJudge, judge_for
from dedistill.evaluation.prompts import EvalSettings, Prompts, distinct
from dedistill.evaluation.sweep import Candidate, Grid, guiders_at
from dedistill.io.hashing import file_sha256
from dedistill.io.ownership import claim
from dedistill.models.model import ARITHMETIC, Model
from dedistill.models.pipeline_files import model_files
from dedistill.models.registry import spec_of
from dedistill.recipe import RESOLVED, Recipe, load_recipe
from dedistill.recipe.schema import Sample
from dedistill.recipe.toml import table_to_toml
from dedistill.release.folder import network_config, read_facts
from dedistill.runs.model import last_weights, open_base, open_finished, sampling_device


@dataclass(frozen=True)
class Compared:
    """What a tool compares. recipes: of the finished runs; data: the one whose data is asked about; candidates: run by run."""

    recipes: list[Recipe]
    data: Recipe
    source: Callable[[], Source]
    runs: list[list[Candidate]]
    prompts: Prompts
    out: Path

    @property
    def candidates(self) -> list[Candidate]:
        return [candidate for run in self.runs for candidate in run]

    @property
    def names(self) -> str:
        return ", ".join(recipe.run.name for recipe in self.recipes)

    def held_out(self) -> Source:
        """The source of held-out samples. Raises UserError for recipes that have none."""
        if self.data.data.source == "pairs":
            raise UserError(
                "no held-out data: these recipes train on stored pairs; name one that trains on data with --data", 2
            )
        return self.source()

    def judge(self) -> DigitJudge | None:
        return None if self.data.data.source == "pictures" else judge_for(self.source())


def open_compared(
    args: Namespace, settings: EvalSettings, folder: str, say: Callable[[str], None], *, steps: int | None = None
) -> Compared:
    """What the arguments of ``dedistill.cli.command.of_candidates`` ask for. steps: of every candidate, default its recipe's.

    settings: what ``evaluation.prompts.ask`` made of them. folder: where results go in the last run, without ``--out``; a kind
    of ``io.ownership``. The data is opened when its source is first called. Raises UserError when the output folder holds what
    is not ours.
    """
    out = args.out or Path(settings.recipes[-1].run.out) / folder
    claim(out, folder, "--out")
    runs = [candidates_of(r, args.candidates, steps=steps, prefix=len(settings.recipes) > 1) for r in settings.recipes]
    source = cache(lambda: open_data(settings.data, sampling_device(), say, usable=settings.usable).source)
    if (prompts := settings.prompts) is None:
        texts = tuple(source().prompts(0, int(args.prompts)))
        prompts = Prompts(texts)
        say(f"prompts: {distinct(texts)}, captions of the data")
    return Compared(settings.recipes, settings.data, source, runs, prompts, out)


def sweep_grid(args: Namespace, compared: Compared) -> Grid:
    """The grid that the arguments of ``dedistill.cli.command.of_sweep`` ask for; what is said twice counts once. Solvers and
    guiders that they do not name are those of all recipes, for every candidate."""
    prompts, samples = compared.prompts, [recipe.sample for recipe in compared.recipes]
    solvers = tuple(dict.fromkeys(args.solver or [s.solver for s in samples]))
    names = tuple(dict.fromkeys(args.guider or [s.guider for s in samples]))
    cfgs, skips, seeds, steps = (tuple(dict.fromkeys(values)) for values in (args.cfg, args.skip, args.seeds, args.steps))
    return Grid(guiders_at(cfgs, skips, names), prompts.texts, seeds, steps, solvers, prompts.trained)


def clip_judge(args: Namespace) -> ClipJudge | None:
    """The judge in ``--clip``. Raises UserError for ``--real`` without it."""
    if args.real and not args.clip:
        raise UserError("--real: CLIP compares with real images; name its folder with --clip", exit_code=2)
    return ClipJudge(args.clip, args.real, device=sampling_device()) if args.clip else None


def candidates_of(
    recipe: Recipe, wanted: list[str] | None, *, steps: int | None = None, prefix: bool = False
) -> list[Candidate]:
    """Candidates of one run, in the order base, averages, last.

    wanted: any of ``base``, ``last``, ``posthoc`` (all averages) and names of files in RUN/posthoc without their
    ending; None for all there are. prefix: put the run's name before each. A run without adapter has only ``last``,
    which bears the run's name. Raises UserError for names that there are not.
    """
    out = Path(recipe.run.out)
    steps = steps or recipe.sample.steps
    if recipe.adapter is None:
        _chosen(["last"], [], wanted, out)
        identity = _identity(recipe, out / "model")
        return [Candidate(recipe.run.name, identity, steps, lambda: open_finished(recipe))]
    label = f"{recipe.run.name} " if prefix else ""
    averages = {p.stem: p for p in sorted((out / "posthoc").glob("*.safetensors"))}
    found = []
    for name in _chosen(["base", *averages, "last"], [*averages], wanted, out):
        path = None if name == "base" else averages.get(name) or last_weights(out)
        parts = [p for p in (recipe.model.path, path) if p is not None]
        identity, average = _identity(recipe, *parts), name in averages
        found.append(Candidate(f"{label}{name}", identity, steps, _opener(recipe, path), average))
    return found


def _chosen(known: list[str], averages: list[str], wanted: list[str] | None, out: Path) -> list[str]:
    """Those of ``known`` that are ``wanted``, in their order."""
    if wanted is None:
        return known
    names = [n for w in wanted for n in (averages if w == "posthoc" else [w])]
    if unknown := [n for n in names if n not in known]:
        raise UserError(f"no candidate '{unknown[0]}' in '{out}'; there are {', '.join(known)}", exit_code=2)
    if not names:
        raise UserError(f"no averages in '{out / 'posthoc'}': make them with dedistill posthoc", exit_code=2)
    return [n for n in known if n in names]


def _opener(recipe: Recipe, path: Path | None) -> Callable[[], Model]:
    return lambda: open_base(recipe) if path is None else open_finished(recipe, path)


def _identity(recipe: Recipe, *places: Path | str) -> str:
    """Hash of everything an image depends on beside prompt, noise and steps: files of models, and how they are used."""
    settings = recipe.resolved()
    for key in ("solver", "guider"):
        settings["sample"].pop(key)  # a cell's own
    for key in ("path", "components"):
        if settings["model"][key] and Path(settings["model"][key]).exists():
            settings["model"].pop(key)  # its files are hashed, wherever they lie
    used = [settings[table] for table in ("model", "base", "adapter", "sample")]
    used += [settings["train"]["precision"], settings["run"]["seed"], ARITHMETIC]
    digest = hashlib.sha256(json.dumps(used).encode())
    if recipe.model.components and Path(recipe.model.components).is_dir():
        places += (recipe.model.components,)
    for place in map(Path, places):
        if str(place) == recipe.model.path and recipe.model.revision and not place.exists():
            continue  # a hub id: its commit is among the settings
        files = model_files(place).values()
        if not any(file.suffix == ".safetensors" for file in files):
            raise UserError(f"no weights in '{place}': train the recipe that makes them first")
        for file in [*files, *sorted(place.rglob("scheduler_config.json"))]:  # by which sample.shift = "auto" goes
            digest.update(f"{file.name} {file_sha256(file)}\n".encode())
    return digest.hexdigest()


def named_candidate(named: str, weights: str, overrides: Sequence[str]) -> tuple[Candidate, Sample]:
    """A model to sample from, and how its recipe samples. named: a recipe, the folder of a run, or that of a model.

    weights: of a run, as ``candidates_of`` calls them. Raises UserError where there is no such thing.
    """
    folder = Path(named)
    own = next((folder / name for name in (RESOLVED, "recipe.toml") if (folder / name).is_file()), None)
    if own or not folder.is_dir():
        recipe = load_recipe(own or named, overrides)
        return candidates_of(recipe, [weights], prefix=True)[0], recipe.sample
    if weights not in ("last", "base"):
        raise UserError(f"--weights {weights}: '{folder}' is a model, of which there is only one", 2)
    recipe = recipe_of_model(folder, overrides)
    return Candidate(folder.name, _identity(recipe, folder), recipe.sample.steps, lambda: open_base(recipe)), recipe.sample


def recipe_of_model(folder: Path, overrides: Sequence[str]) -> Recipe:
    """A recipe that opens a model folder as it was trained, by what the folder says of itself."""
    facts, config = read_facts(folder), network_config(folder)
    model: dict[str, Any] = {"family": spec_of(config, facts.get("family")).name, "path": str(folder)}
    model |= {key: facts[key] for key in ("mask", "t5_mask", "null", "text_length") if key in facts}
    if (guidance := facts.get("guidance", "none")) != "none":
        model["guidance"] = "bypass" if guidance == "bypassed" else float(guidance)
    tables = {
        "run": {"name": "model", "out": str(folder)},
        "model": model,
        "data": {"source": "digits"},
        "train": {"steps": 1, "batch": 1, "lr": 1e-4},
    }
    with TemporaryDirectory() as temporary:
        file = Path(temporary) / "model.toml"
        file.write_text(table_to_toml(tables))
        return load_recipe(file, overrides)
