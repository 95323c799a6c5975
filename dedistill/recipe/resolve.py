"""Every number of a run decided before it starts: defaults that depend on other keys or on the family, and the plan. No torch.

So the recipe that is printed, and recipe.json, hold every number that will be used; none is left only where a key has no
effect, or where it means something by itself (no limit, off), as its description says.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any, TypeVar, cast

from dedistill.recipe.fields import BY_FAMILY, Auto, Default, Table
from dedistill.recipe.model_tables import Model
from dedistill.recipe.objectives import OBJECTIVES
from dedistill.recipe.schema import Recipe
from dedistill.recipe.toml import fields_of, table_in

T = TypeVar("T")

# --- defaults that depend on other keys or on the family, made values before anything runs ---------------------------


BEFORE = (
    ("adapter.targets.factor", Default(4, "adapter.kind", ("lokr",))),
    ("adapter.targets.rank", Default(16, "adapter.kind", ("lora",))),
    ("adapter.targets.rank", Default("full", "adapter.kind", ("lokr",))),
    ("adapter.init_scale", Default(1e-3, "adapter.init", ("perturbed_normal",))),
    ("data.resolutions", Default([1024], "data.source", ("pictures",))),
    ("data.crops", Default(["aspect"], "data.source", ("pictures",))),
    ("data.crops_per_picture", Default(1, "data.source", ("pictures",))),
    ("data.max_upscale", Default(1.0, "data.source", ("pictures",))),
    ("data.missing_captions", Default("error", "data.source", ("pictures",))),
    ("data.split_lines", Default("auto", "data.source", ("pictures",))),
    ("data.held_out", Default(0.02, "data.source", ("pictures",))),
    ("data.caption_dropout", Default(0.1, "train.objective", ("flow",))),
    ("data.caption_dropout", Default(0.0, "train.objective", ("distill", "reflow"))),
    ("timesteps.alpha", Default(2.0, "timesteps.density", ("beta",))),
    ("timesteps.beta", Default(2.0, "timesteps.density", ("beta",))),
    ("timesteps.mean", Default(0.0, "timesteps.density", ("logit_normal",))),
    ("timesteps.std", Default(1.0, "timesteps.density", ("logit_normal",))),
    ("timesteps.scale", Default(1.29, "timesteps.density", ("mode",))),
    ("train.lr_floor", Default(0.0, "train.schedule", ("linear", "cosine"))),
    ("validate.samples", Default(256, "validate.every")),
    ("model.text_length", Default(BY_FAMILY)),
    ("model.guidance", Default(BY_FAMILY)),
)
"""What none meant in every run whose recipe.json was written before defaults were resolved. These numbers never change,
whatever becomes of the schema's: with them old runs are continued."""


def resolve(recipe: Recipe) -> Recipe:
    """``recipe`` with a value for every key that has an effect; one that is resolved already stays as it is."""
    data = _filled(recipe.resolved(), _defaults(Recipe), _of_family(recipe.model, "family_defaults"))
    if data["sample"]["guidance"] is None and data["model"]["guidance"] != "bypass":
        data["sample"]["guidance"] = data["model"]["guidance"]
    resolved = Recipe.model_validate(data)
    resolved._places.update(recipe._places)
    resolved._files, resolved._notes = recipe._files, recipe._notes
    return resolved


def filled(value: T | None, key: str) -> T:
    """``value`` of a key that :func:`resolve` fills in. Raises ValueError for a recipe that was not resolved."""
    if value is None:
        raise ValueError(f"{key} is left out: the recipe is not resolved")
    return value


def chosen(value: T | Auto, key: str) -> T:
    """``value`` of a key that :func:`settled` fills in. Raises ValueError for a recipe that was not settled."""
    if value == "auto":
        raise ValueError(f"{key} is 'auto': the recipe is not settled")
    return cast(T, value)


def settled(recipe: Recipe, *, swap: int = 0, checkpointing: bool | int = False) -> Recipe:
    """``recipe`` with these in the place of every "auto" that is chosen for the device at hand. By default as on a CPU: off."""
    tables: dict[str, Table] = {}
    if recipe.base.swap == "auto":
        tables["base"] = recipe.base.model_copy(update={"swap": swap})
    if recipe.train.gradient_checkpointing == "auto":
        tables["train"] = recipe.train.model_copy(update={"gradient_checkpointing": checkpointing})
    return recipe.model_copy(update=tables)


def recipe_of(data: Mapping[str, Any]) -> Recipe:
    """A resolved recipe from plain data, keys named as in TOML. Contradictions are not looked for."""
    return resolve(Recipe.model_validate(data))


def as_it_was_meant(recorded: dict[str, Any], model: Model) -> dict[str, Any]:
    """The recorded recipe of a run, with the numbers that none stood for where a version before resolving wrote it.

    model: the [model] table of the recipe that continues the run; on another model it is refused anyway.
    """
    meant = _filled(recorded, BEFORE, _of_family(model, "defaults_before"))
    sample, timesteps = meant.get("sample"), meant.get("timesteps")
    if isinstance(sample, dict) and isinstance(timesteps, dict):
        sample.setdefault("shift", timesteps.get("shift"))  # there was one for both
    return meant


def _of_family(model: Model, function: str) -> dict[str, Any]:
    """The family's own defaults. Families stand above recipes, and are looked up by name like a plug-in."""
    return getattr(import_module("dedistill.models.registry"), function)(model)


def _defaults(model: type[Table], path: str = "") -> Iterator[tuple[str, Default]]:
    """(dotted key, default) of every key that is resolved."""
    for name, field in fields_of(model).items():
        yield from ((path + name, default) for default in field.metadata if isinstance(default, Default))
        if inner := table_in(field.annotation):
            yield from _defaults(inner, f"{path}{name}.")


def _filled(data: dict[str, Any], defaults: Iterable[tuple[str, Default]], family: dict[str, Any]) -> dict[str, Any]:
    data = deepcopy(data)
    for key, default in defaults:
        *tables, name = key.split(".")
        value = family.get(key) if default.value == BY_FAMILY else default.value
        if default.holds(_value(data, default.key)):
            for row in _rows(data, tables):
                if row.get(name) is None:
                    row[name] = deepcopy(value)
    return data


def _rows(data: dict[str, Any], tables: list[str]) -> list[dict[str, Any]]:
    """The tables at a dotted path, of which there are several in an array; none where the path ends early."""
    rows: list[Any] = [data]
    for table in tables:
        found = [row.get(table) for row in rows if isinstance(row, dict)]
        rows = [row for at in found for row in (at if isinstance(at, list) else [at])]
    return [row for row in rows if isinstance(row, dict)]


def _value(data: dict[str, Any], key: str) -> object:
    *tables, name = key.split(".")
    return next((row.get(name) for row in _rows(data, tables)), None)


def shifts(recipe: Recipe, own: Callable[[], float | None]) -> str:
    """:func:`shift_note` of a recipe; nothing where its objective does not look at timesteps.shift."""
    unused = OBJECTIVES[recipe.train.objective].own_sigmas
    return "" if unused else shift_note(recipe.timesteps.shift, recipe.sample.shift, own)


def shift_note(training: float | str, sampling: float | str | None, own: Callable[[], float | None]) -> str:
    """What to say where sigma is shifted otherwise in training than when images are made; else nothing.

    training, sampling: timesteps.shift and sample.shift. own: what auto stands for, where that is one number and known.
    """
    auto = [not isinstance(shift, (int, float)) for shift in (training, sampling)]
    model = own() if any(auto) else None
    told = f"auto (the model's own{f', {model:g}' if model else ''})"
    numbers = [model if a else float(shift or 0) for a, shift in zip(auto, (training, sampling))]
    said = [told if a else f"{number:g}" for a, number in zip(auto, numbers)]
    if numbers[0] == numbers[1]:
        return ""
    return (
        f"timesteps.shift = {said[0]} in training, and sample.shift = {said[1]} in previews, sweeps, meters and the exported "
        "scheduler: set both alike if that is not meant"
    )


# --- every number of a run decided before it starts ------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    steps: int
    batch: int
    micro_batch: int
    micro_steps: int
    samples: int
    checkpoints: int
    snapshots: int
    validations: int

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


def make_plan(recipe: Recipe) -> Plan:
    """What ``recipe`` amounts to on one process."""
    t = recipe.train
    micro = 1 if t.exact else t.micro_batch or t.batch

    def times(every: int) -> int:
        return -(-t.steps // every) if every else 0

    return Plan(
        steps=t.steps,
        batch=t.batch,
        micro_batch=micro,
        micro_steps=t.batch // micro,
        samples=t.steps * t.batch,
        checkpoints=max(1, times(recipe.checkpoint.every)),
        snapshots=times(recipe.snapshot.every),
        validations=times(recipe.validate_.every),
    )
