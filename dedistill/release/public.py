"""What a release tells of how it was made: recipes and provenance without the places, users and data sets of this machine."""

import copy
import tomllib
from pathlib import Path
from typing import Any

from dedistill.errors import UserError
from dedistill.families.licences import public_name
from dedistill.recipe.emit import table_to_toml

_FACTS = (
    *("family", "base", "merges", "trained", "quantized"),
    *("guidance", "mask", "t5_mask", "text_length", "text", "picture"),
)
"""Keys of dedistill.json that whoever uses the weights needs."""


def public_facts(facts: dict[str, Any]) -> dict[str, Any]:
    """What ``dedistill.json`` says of a model folder, as a release may say it: the same but for local paths."""
    told = {key: facts[key] for key in _FACTS if key in facts}
    if "base" in told:
        told["base"] = {**told["base"], "path": source_name(facts)}
    for key in ("merges", "trained"):
        if key in told:
            told[key] = [_public_step(step) for step in told[key]]
    return told


def _public_step(step: dict[str, Any]) -> dict[str, Any]:
    told = {**step, "recipe": public_recipe(step["recipe"])}
    if "adapter" in step:
        told["adapter"] = Path(step["adapter"]).name
    if "adapter_header" in step:  # of other trainers too, whose headers tell of folders
        told["adapter_header"] = own_entries(step["adapter_header"])
    return told


def own_entries(header: dict[str, str]) -> dict[str, str]:
    """The entries of an adapter's header that are ours, with a public recipe."""
    told = {key: value for key, value in header.items() if key.startswith("dedistill.")}
    if "dedistill.recipe" in told:
        told["dedistill.recipe"] = public_recipe(told["dedistill.recipe"])
    return told


def source_name(facts: dict[str, Any]) -> str:
    """What a model folder goes back to, as a release names it; empty when it does not say."""
    base = facts.get("base", {})
    return public_name(str(base.get("path") or ""), base.get("revision"))


def public_recipe(text: str) -> str:
    """A recipe's TOML without run.out and places and names of data, its model named and not located.

    That is still what the card, a merge and the formats read. To train by it, say where things are. Unchanged where there
    is nothing to hide.
    """
    recipe = read_recipe(text)
    told = copy.deepcopy(recipe)
    for table, keys in (("run", ("out",)), ("data", ("path", "cache"))):
        for key in keys:
            told.get(table, {}).pop(key, None)
    for row in told.get("data", {}).get("sets", []):
        for key in ("path", "name"):
            row.pop(key, None)
    model = told.get("model", {})
    for key in ("path", "components"):
        if key in model:
            model[key] = public_name(model[key], model.get("revision"))
    return text if told == recipe else table_to_toml(told)


def read_recipe(text: str) -> dict[str, Any]:
    """A recipe that was written into a file, as plain data; empty for an empty text."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise UserError(f"the recipe in the file's header cannot be read: {e}") from e
