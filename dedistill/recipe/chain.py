"""Chains: recipes and commands in an order, each stage of which goes on where it was stopped."""

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dedistill.errors import UserError
from dedistill.recipe.explain import quote
from dedistill.recipe.fields import Place, Positive
from dedistill.recipe.load import load_recipe
from dedistill.recipe.shipped import CHAIN, FOLDER, PREFIX
from dedistill.recipe.toml import dotted, locate

Tool = Literal["train", "pairs", "posthoc", "sweep", "measure", "evaluate", "influence", "merge", "export", "report"]
SAFE = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class Stage(BaseModel):
    """One command of a chain."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(pattern=SAFE)
    command: Tool
    recipe: str | list[str] = Field(default="", description="a file beside the chain's, without .toml, or dedistill:NAME")
    options: list[str] = Field(default=[], description="further words of the command")
    scaled: list[str] = Field(default=[], description="options, and keys of the recipe, whose numbers the scale multiplies")
    beside: bool = Field(default=False, description="go on with the next stage at once")


class _Stages(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    out: Place
    threads: Positive | None = None
    scale: float = Field(default=1.0, gt=0, description="times the numbers that the stages let scale")
    stages: list[Stage] = Field(min_length=1)


@dataclass(frozen=True)
class Chain:
    """``out``: the folder that all of it is written into; ``threads``: of the CPU for each command; None: all cores; ``scale``:
    times the numbers that stages let scale."""

    out: Path
    threads: int | None
    scale: float
    stages: list[Stage]
    folder: str
    """Where its recipes are: a folder, or dedistill:NAME."""

    def words(self, stage: Stage, scale: float) -> list[str]:
        """The command line of ``stage`` after "dedistill", with its scaled numbers times ``scale``, rounded, at least 1.

        Raises UserError for a name in ``scaled`` that stands for no whole number.
        """
        recipes, options = self.recipes(stage), list(stage.options)
        known = load_recipe(recipes[0]).resolved() if recipes and stage.scaled else {}
        settings: list[str] = []
        for name in stage.scaled:
            place = options.index(name) + 1 if name in options else 0
            number = "".join(options[place : place + 1]) if place else str(_found(known, name.split(".")))
            if not number.isdecimal():
                of = "option, or key of its recipe, with a whole number"
                raise UserError(f"{self.folder}/{CHAIN}: stage {quote(stage.name)}: scaled: {quote(name)} is no {of}", 2)
            now = str(max(min(1, int(number)), round(int(number) * scale)))  # what is off stays off
            if place:
                options[place] = now
            elif now != number:
                settings += ["--set", f"{name}={now}"]
        return [stage.command, *recipes, *options, *settings]

    def recipes(self, stage: Stage) -> list[str]:
        """The recipes that a stage names, as a command line does."""
        names = [stage.recipe] if isinstance(stage.recipe, str) else stage.recipe
        end = "" if self.folder.startswith(PREFIX) else ".toml"
        return [name if name.startswith(PREFIX) else f"{self.folder}/{name}{end}" for name in names if name]


def _found(tables: dict[str, Any], keys: list[str]) -> object:
    for key in keys[:-1]:
        tables = tables.get(key) or {}
    return tables.get(keys[-1])


def chain_file(place: str) -> Path:
    """What a chain of that name is read from, whether it is there or not."""
    return (FOLDER / place.removeprefix(PREFIX) if place.startswith(PREFIX) else Path(place)) / CHAIN


def load_chain(place: str) -> Chain:
    """Read FOLDER/chain.toml; ``place`` is a folder, or dedistill:NAME of one that comes with the package.

    Raises UserError with all that is wrong, by file and line.
    """
    file = chain_file(place)
    if not file.is_file():
        known = ", ".join(f"{PREFIX}{f.parent.relative_to(FOLDER)}" for f in sorted(FOLDER.rglob(CHAIN)))
        raise UserError(f"'{place}' has no {CHAIN}; with dedistill come the chains {known}", 2)
    try:
        text = file.read_text(encoding="utf-8")
        data = tomllib.loads(text)
    except (OSError, ValueError) as e:
        raise UserError(f"{file}: cannot be read: {e}", 2) from e
    try:
        read = _Stages.model_validate(data)
    except ValidationError as e:
        places = locate(text)
        raise UserError("\n".join(_mistake(file, error["loc"], error["msg"], places) for error in e.errors()), 2) from None
    names = [stage.name for stage in read.stages]
    if twice := next((n for n in names if names.count(n) > 1), None):
        raise UserError(f"{file}: two stages are called {quote(twice)}", 2)
    return Chain(Path(read.out), read.threads, read.scale, read.stages, place.rstrip("/"))


def _mistake(file: Path, where: tuple[str | int, ...], what: str, places: dict[str, int]) -> str:
    parts = where
    while parts and dotted(parts) not in places:
        parts = parts[:-1]
    line = f":{places[dotted(parts)]}" if parts else ""
    return f"{file}{line}: {dotted(where)}: {what[:1].lower()}{what[1:]}"
