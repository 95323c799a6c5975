"""Recipes in headers of files that anyone may have written."""

import pytest
from full_recipes import IMAGES, MODE, NEW, TRAINED

from dedistill.errors import UserError
from dedistill.recipe.embedded import read_recipe


@pytest.mark.parametrize("text", [NEW, TRAINED, MODE, IMAGES, "", "[train]\nlr = 1\nsteps = -5\n[new]\nx = 1"])
def test_recipes_of_any_version_are_plain_data(text):
    assert isinstance(read_recipe(text), dict)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model =", "cannot be read: Invalid value"),
        ("x = " + "[" * 50_000, "nested too deeply"),
        ("x = '" + "a" * 3_000_000 + "'", "3,000,006 characters"),
        ("# " + "a" * 1_100_000 + "\n[model]\npath = 'x'", "more than a recipe has"),
        ("\n" + ".".join(["a"] * 4000) + " = 1", "line 2: a key of more than 32 parts"),
        ("train = 3", "'train' holds"),
        ("[[model]]\npath = 'x'", "'model' holds"),
        ("[model]\npath = ['x']", "'model.path' holds"),
        ("[model]\nfamily = {a = 1}", "'model.family' holds"),
        ("[data]\nresolutions = 512", "'data.resolutions' holds"),
        ("[data]\nresolutions = [512, '768']", "'data.resolutions' holds"),
        ("[data]\nsets = {path = 'x'}", "'data.sets' holds"),
        ("[data]\nsets = [{path = 3}]", "'data.sets.path' holds"),
        ("[run]\nout = true", "'run.out' holds"),
    ],
)
def test_other_kinds_are_refused_by_file_and_key(text, said):
    with pytest.raises(UserError, match=f"the recipe in 'a.safetensors' .*{said}"):
        read_recipe(text, "'a.safetensors'")
