"""Every number that a run uses stands in its resolved recipe."""

import re
from pathlib import Path

import pytest
from full_recipes import FOLDS, IMAGES, MODE, NEW, SMALL, TRAINED

from dedistill.recipe import Recipe, load_recipe
from dedistill.recipe.fields import BY_FAMILY, Default, Table
from dedistill.recipe.resolve import BEFORE, as_it_was_meant, resolve
from dedistill.recipe.rules import contradictions
from dedistill.recipe.shipped import shipped_recipes
from dedistill.recipe.toml import fields_of, table_in

UNSAID_BY_SOME = {"model.guidance", "model.null", "sample.height", "sample.width"}
"""Keys for which a family may have nothing to say."""
CHANGED = {"data.held_out": 0.02}
"""What none meant before resolving, where it means something else today."""
SHIPPED = list(shipped_recipes().values())
FULL = {"new": NEW, "trained": TRAINED, "mode": MODE, "images": IMAGES, "folds": FOLDS, "small": SMALL}
MEANS_SOMETHING = {
    **dict.fromkeys(
        ["model.path", "model.new", "adapter.targets.pattern", "adapter.targets.preset"], "the other of two is set"
    ),
    **dict.fromkeys(
        [
            "model.revision",
            "model.components",
            "model.image_prompts",
            "data.path",
            "data.pairs",
            "data.pairs_share",
            "data.cache",
        ],
        "nothing is named",
    ),
    **dict.fromkeys(["data.sets.name", "data.sets.captions"], "what is found there"),
    "data.sets.file_column": "the column file_name",
    "data.sets.split": "train, where there are several",
    "data.fold": "as held_out says",
    **dict.fromkeys(["data.limit", "online.keep", "train.micro_batch", "train.max_grad_norm"], "no limit"),
    **dict.fromkeys(["snapshot.ema", "adapter", "train.min_snr", "train.huber", "train.lpips"], "off"),
    "sample.guidance": "as model.guidance, where that is no number",
}
"""Keys in whose place no number is used when they are none. A new optional key has a Default, or a good reason to be here."""


def optional_keys(model: type[Table] = Recipe, path: str = "") -> dict[str, list[Default]]:
    """Every key that may be none, and the defaults that take its place."""
    found = {}
    for name, field in fields_of(model).items():
        if not field.is_required() and field.get_default(call_default_factory=True) is None:
            found[path + name] = [m for m in field.metadata if isinstance(m, Default)]
            assert re.search(r"\b[Nn]one\b", field.description) or found[path + name], f"{path}{name}: what does none mean?"
        if inner := table_in(field.annotation):
            found |= optional_keys(inner, f"{path}{name}.")
    return found


def nones(table: object, path: str = "") -> set[str]:
    """Dotted keys of plain data that are none, without the numbers of arrays."""
    if isinstance(table, dict):
        return {key for name, value in table.items() for key in nones(value, f"{path}.{name}".lstrip("."))}
    if isinstance(table, list):
        return {key for value in table for key in nones(value, path)}
    return {path} if table is None else set()


def unresolved(path: Path, monkeypatch) -> Recipe:
    """The recipe with its none, as versions before resolving recorded it."""
    with monkeypatch.context() as patch:
        patch.setattr("dedistill.recipe.load.resolve", lambda recipe: recipe)
        return load_recipe(path)


def value_of(found: dict, key: str):
    for part in key.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def test_a_key_that_may_be_none_has_a_default_or_means_something_by_itself():
    assert {key for key, defaults in optional_keys().items() if not defaults} == set(MEANS_SOMETHING)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_none_is_left_only_where_no_number_is_used(path):
    recipe = load_recipe(path)
    for key in nones(recipe.resolved()) - set(MEANS_SOMETHING):
        holding = [d for d in optional_keys()[key] if d.holds(value_of(recipe.resolved(), d.key))]
        assert all(d.value == BY_FAMILY and key in UNSAID_BY_SOME for d in holding), key


@pytest.mark.parametrize("path", [f for f in SHIPPED if "sd" not in f"{f.parent.name}/{f.stem}"], ids=lambda p: p.stem)
def test_none_of_an_older_version_means_the_numbers_of_that_version(path, monkeypatch):
    """Today they are the schema's; a changed default must part here, and the frozen numbers stay."""
    before, now = unresolved(path, monkeypatch), load_recipe(path)
    meant = as_it_was_meant(before.resolved(), now.model)
    for key in {key for key, _ in BEFORE}:
        unsaid = value_of(before.resolved(), key) is None
        today = CHANGED[key] if key in CHANGED and unsaid and value_of(now.resolved(), key) else value_of(now.resolved(), key)
        assert value_of(meant, key) == today, key
    assert nones(before.resolved()) > nones(now.resolved())


@pytest.mark.parametrize("text", FULL.values(), ids=FULL)
def test_resolving_twice_changes_nothing_and_contradicts_nothing(load, text):
    recipe = load(text)
    assert resolve(recipe).resolved() == recipe.resolved() and contradictions(recipe) == []
    assert resolve(recipe).where("train.lr") == recipe.where("train.lr") != "train.lr"


@pytest.mark.parametrize("text", FULL.values(), ids=FULL)
def test_where_a_default_does_not_hold_the_key_is_refused(load, text):
    """So a default never stands in a recipe in which it has no effect."""
    recipe = load(text)
    for key, defaults in optional_keys().items():
        table, _, name = key.rpartition(".")
        if not defaults or "targets" in key or any(d.holds(value_of(recipe.resolved(), d.key)) for d in defaults):
            continue
        if value_of(recipe.resolved(), table) is None:
            continue
        data = recipe.resolved()
        data[table][name] = defaults[0].value
        assert [clash.key for clash in contradictions(Recipe.model_validate(data))] in ([key], [table]), key


def test_a_family_that_nobody_knows_resolves_the_rest(load):
    """It is refused when it is asked for, with the nearest name."""
    recipe = load(SMALL, "train.schedule=cosine")
    assert (recipe.train.lr_floor, recipe.data.caption_dropout, recipe.model.text_length) == (0.0, 0.1, None)


def test_defaults_do_not_share_their_arrays(load):
    text = IMAGES.replace("resolutions = [512, 1024]\n", "")
    one, other = load(text), load(text)
    one.data.resolutions.append(64)
    assert other.data.resolutions == [1024]
