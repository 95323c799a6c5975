"""What ``dedistill chain --rehearse`` runs: the same stages, on recipes that were written small."""

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

from dedistill.cli.rehearsal import SAMPLE_SIDES, shrink, write_small_model
from dedistill.cli.tiny import write_samples
from dedistill.errors import UserError
from dedistill.io import ownership
from dedistill.io.atomic import make_folder, replace_file
from dedistill.models.registry import get_family
from dedistill.recipe import Recipe, load_recipe, to_toml
from dedistill.recipe.chain import Chain, Stage
from dedistill.recipe.shipped import PREFIX
from dedistill.release.folder import new_folder

COUNT = 20
"""Pairs, and prompts of a file that is not there yet."""
FEW = {"--count": str(COUNT), "--shard-size": "8", "--samples": "8", "--seeds": "0"}
"""Options with small numbers."""
MADE = ("recipes", "models", "images", "cache", "prompts.txt", "chain.json")
"""What a rehearsal of a chain writes itself, beside its stages' folders."""


def small_chain(chain: Chain) -> Chain:
    """``chain`` on tiny random models, few pairs and steps, written into ``<out>-rehearsal``, where an earlier one goes.

    What one stage makes the next one uses, as in the chain itself.
    """
    out = Path(f"{chain.out}-rehearsal")
    ownership.claim(out, "chain", "out: the rehearsal's folder")
    with ownership.hold(out, "out"):
        made = {*MADE, *(f"{stage.name}.log" for stage in chain.stages)}
        for place in [place for place in out.iterdir() if place.name in made or _is_ours(place)]:
            ownership.remove(place)
        make_folder(out / "recipes")
        moved = _Moved(chain.out, out)
        options = (
            word for stage in chain.stages for word in stage.options if word.startswith(PREFIX) or word.endswith(".toml")
        )
        names = _short([*dict.fromkeys([*(name for stage in chain.stages for name in chain.recipes(stage)), *options])])
        for name, short in names.items():
            with contextlib.redirect_stdout(sys.stderr):  # of libraries
                replace_file(out / "recipes" / f"{short}.toml", to_toml(_small(load_recipe(name), moved)).encode())
        stages = [_small_stage(chain, stage, names, moved) for stage in chain.stages]
    return Chain(out, chain.threads, 1.0, stages, str(out / "recipes"))


def _is_ours(place: Path) -> bool:
    """Whether a stage made it, a folder of ours or a model; notes beside them stay."""
    return ownership.kind_of(place) is not None or (place / "dedistill.json").exists()


def _recipes(chain: Chain, stage: Stage) -> list[str]:
    """All that its command line names."""
    return [*chain.recipes(stage), *(word for word in stage.options if word.startswith(PREFIX) or word.endswith(".toml"))]


def _short(recipes: list[str]) -> dict[str, str]:
    """Recipe as the chain names it -> what its small one is called."""
    stems = [Path(name).stem for name in recipes]
    return {name: stem if stems.count(stem) == 1 else f"{stem}{i}" for i, (name, stem) in enumerate(zip(recipes, stems))}


class _Moved:
    """Where the rehearsal has what the chain has in its folder ``old``."""

    def __init__(self, old: Path, new: Path) -> None:
        self.old, self.new = os.path.normpath(old), new

    def __call__(self, path: str) -> str | None:
        """None for what does not lie there."""
        inside = os.path.relpath(os.path.normpath(path), self.old)
        return None if inside.startswith("..") or os.path.isabs(path) != os.path.isabs(self.old) else str(self.new / inside)


def _small(recipe: Recipe, moved: _Moved) -> Recipe:
    run = moved(recipe.run.out)
    if run is None:
        raise UserError(f"{recipe.where('run.out')}: '{recipe.run.out}' is not in the chain's folder '{moved.old}'", 2)
    model: dict[str, Any] = {}
    if recipe.model.path:
        place = moved(recipe.model.path)
        if place is None:
            family = get_family(recipe.model.family, recipe.where("model.family"))
            place = str(moved.new / "models" / recipe.model.family)
            if not Path(place).exists():
                with new_folder(Path(place)) as folder:
                    write_small_model(recipe, family, folder, None)
        model = {"path": place, "revision": None, "components": None}
    pairs = {"path": recipe.data.path if recipe.data.source == "pairs" else None, "pairs": recipe.data.pairs}
    data: dict[str, Any] = {key: moved(place) or place for key, place in pairs.items() if place}
    if recipe.data.source == "pictures":
        images = moved.new / "images"
        if not images.exists():
            write_samples(images, *SAMPLE_SIDES)
        sets = [recipe.data.sets[0].model_copy(update={"path": str(images)})]
        data |= {"cache": str(moved.new / "cache"), "sets": sets, "held_out": 0.25}
    return shrink(recipe, run=Path(run), model=model, data=data, small_images=recipe.sample.height is not None)


def _small_stage(chain: Chain, stage: Stage, names: dict[str, str], moved: _Moved) -> Stage:
    def small(word: str) -> str:
        if word in names:
            return f"{moved.new}/recipes/{names[word]}.toml"
        return (moved(word) if "/" in word else None) or word

    options = [small(word) for word in stage.options]
    for i, name in enumerate(options[:-1]):
        if name == "--prompts" and not options[i + 1].isdecimal() and not Path(options[i + 1]).exists():
            options[i + 1] = str(_prompts(moved.new))
        if name in FEW and options[i + 1].isdecimal():
            options[i + 1] = str(min(int(options[i + 1]), int(FEW[name])))
        if name == "--steps" and stage.command == "pairs":
            points = options[options.index("--points") + 1] if "--points" in options else "4"
            options[i + 1] = str(max(2, int(points)))
    if stage.command == "pairs" and "--count" not in options:
        options += ["--count", FEW["--count"]]
    recipes = [names[name] for name in chain.recipes(stage)]
    return stage.model_copy(update={"recipe": recipes, "options": options, "scaled": []})


def _prompts(out: Path) -> Path:
    file = out / "prompts.txt"
    replace_file(file, "".join(f"a drawing of {i} trees\n" for i in range(COUNT)).encode())
    return file
