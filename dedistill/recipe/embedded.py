"""Recipes that stand in files of weights, where anyone may have written them: plain data of the right kinds, or an error."""

import tomllib
from typing import Any, Literal, get_args, get_origin

from dedistill.errors import UserError
from dedistill.recipe.fields import Table
from dedistill.recipe.schema import Recipe
from dedistill.recipe.toml import check_size, fields_of, table_in


def read_recipe(text: str, source: str = "the file's header") -> dict[str, Any]:
    """A recipe that was written into a file, as plain data; empty for an empty text. source: where it stands.

    Its keys may be of another version and their values out of bounds, but where this version has a table, a list or a text,
    there is one. Raises UserError otherwise.
    """
    try:
        check_size(text)
        found = tomllib.loads(text)
    except (ValueError, RecursionError) as e:
        reason = "it is nested too deeply" if isinstance(e, RecursionError) else e
        raise UserError(f"the recipe in {source} cannot be read: {reason}") from e
    if wrong := _wrong(found, Recipe, ""):
        raise UserError(f"the recipe in {source} is none: '{wrong}' holds a value of another kind")
    return found


def _wrong(table: dict[str, Any], model: type[Table], above: str) -> str:
    """The dotted key of the first value that has not the kind of its field in ``model``; empty when all have."""
    for name, field in fields_of(model).items():
        if (value := table.get(name)) is None:
            continue
        key, inner = f"{above}{name}", table_in(field.annotation)
        kinds = _kinds(field.annotation)
        if (list in kinds) != isinstance(value, list):
            return key
        for row in value if isinstance(value, list) else [value]:
            if not isinstance(row, dict if inner else tuple(kinds - {list})):
                return key
            if inner and isinstance(row, dict) and (wrong := _wrong(row, inner, f"{key}.")):
                return wrong
    return ""


def _kinds(annotation: Any) -> set[type]:  # noqa: ANN401 - annotations have no type
    """The Python types that values of a field may have; ``list`` where they may be in one."""
    if get_origin(annotation) is Literal:
        return {type(value) for value in get_args(annotation)}
    own = {list} if get_origin(annotation) is list else {float, int} if annotation is float else set()
    if isinstance(annotation, type):
        own |= {annotation}
    return own.union(*(_kinds(inner) for inner in get_args(annotation) if not isinstance(inner, str | int | float)))
