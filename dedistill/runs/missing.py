"""What a recipe names on this machine and is not there: said before anything heavy is imported, with the way to get it."""

import re
import tomllib
from pathlib import Path

from dedistill.models.registry import get_it, get_spec, looks_local
from dedistill.recipe import Recipe, RecipeError, load_recipe
from dedistill.recipe.shipped import PREFIX, shipped_recipes

_COMMAND = re.compile(r"# +((?:dedistill|hf) .*)")


def require_inputs(recipe: Recipe) -> None:
    """Raises RecipeError, a line for each model, folder or table that the recipe names and that is not there."""
    if missing := missing_inputs(recipe):
        raise RecipeError(missing)


def missing_inputs(recipe: Recipe) -> list[str]:
    """What does not exist, as ``file:line: key: path: no such folder; get it with: ...``. Hub ids are not looked for."""
    models = {"model.path": recipe.model.path, "model.components": recipe.model.components}
    places = {key: path for key, path in models.items() if path and looks_local(path)}
    places |= {f"data.sets.{i}.path": images.path for i, images in enumerate(recipe.data.sets)}
    places |= {f"data.{key}": path for key in ("path", "pairs") if (path := getattr(recipe.data, key))}
    places |= {"train.lpips": recipe.train.lpips} if recipe.train.lpips else {}
    gone = {key: path for key, path in places.items() if not Path(path).exists()}
    return [f"{recipe.where(key)}: {path}: no such {_kind(path)}{_way(recipe, key, path)}" for key, path in gone.items()]


def _kind(path: str) -> str:
    return "file" if Path(path).suffix in (".safetensors", ".parquet", ".csv", ".jsonl") else "folder"


def _way(recipe: Recipe, key: str, path: str) -> str:
    """How to get it, as far as that is known: by what the recipe's head says, from the run that makes it, or from the hub."""
    for command in _commands(recipe):
        if path in command.split():
            return f"; get it with: {command}"
    for name in shipped_recipes():
        if path.startswith(f"{load_recipe(PREFIX + name).run.out}/"):
            return f"; make it with: dedistill train {PREFIX}{name}"
    if not key.startswith("model."):
        return ""
    return get_it(get_spec(recipe.model.family, recipe.where("model.family")), path, _extended_model(recipe))


def _commands(recipe: Recipe) -> list[str]:
    """Commands in the comments of the recipe and of those that it extends."""
    lines = [line for file in recipe.files for line in file.read_text(encoding="utf-8-sig").splitlines()]
    return [found[1] for line in lines if (found := _COMMAND.match(line))]


def _extended_model(recipe: Recipe) -> str:
    """The hub id in whose place the recipe has set a path of its own; empty where there is none."""
    for file in recipe.files[1:]:
        model = tomllib.loads(file.read_text(encoding="utf-8-sig")).get("model", {})
        if model.get("path") and not looks_local(model["path"]):
            return str(model["path"])
    return ""
