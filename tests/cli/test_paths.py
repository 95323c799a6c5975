"""From where the paths of a recipe are looked up, and where a recipe that extends another writes."""

import pytest

from dedistill.cli.main import main
from dedistill.recipe import load_recipe

CHILD = 'extends = "dedistill:flux_schnell_24gb"\n'


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    return tmp_path


def places(recipe) -> tuple[str, str, str | None]:
    return recipe.run.name, recipe.run.out, recipe.data.cache


def test_a_shipped_recipe_is_found_from_any_folder_by_its_name():
    recipe = load_recipe("dedistill:flux_schnell_24gb")
    assert places(recipe) == ("flux-schnell-24gb", "runs/flux_schnell_24gb", "cache/flux_schnell_24gb")
    assert recipe.where("train.batch").startswith("dedistill:flux_schnell_24gb:")
    assert recipe.where("train.steps").startswith("dedistill:flux_schnell:")  # of the one it extends


def test_extends_is_looked_up_from_its_own_file_and_all_else_from_the_working_folder(elsewhere):
    (elsewhere / "mine/base.toml").write_text(CHILD)
    (elsewhere / "mine/top.toml").write_text(
        'extends = "base.toml"\n[model]\npath = "models/x"\n[[data.sets]]\npath = "data/x"\n'
    )
    recipe = load_recipe("mine/top.toml")
    assert (recipe.model.path, recipe.data.sets[0].path, recipe.run.out) == ("models/x", "data/x", "runs/top")


def test_a_training_run_writes_into_the_working_folder(elsewhere, teacher_recipe):
    """The run and the shards of another recipe's folder are nowhere near the recipe."""
    (elsewhere / "mine/small.toml").write_text(f'extends = "{teacher_recipe}"\n')
    assert main(["train", "mine/small.toml"]) == 0
    assert (elsewhere / "runs/small/metrics.jsonl").exists() and not (elsewhere / "mine/runs").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (CHILD, ("my-recipe", "runs/my-recipe", "cache/my-recipe")),
        (CHILD + '[data]\ncache = "fast/cache"\n', ("my-recipe", "runs/my-recipe", "fast/cache")),
        (CHILD + '[run]\nname = "a"\nout = "b"\n', ("a", "b", "cache/flux_schnell_24gb")),
        ('extends = "dedistill:digits/teacher"\n', ("my-recipe", "runs/my-recipe", None)),
    ],
)
def test_a_child_without_run_writes_where_its_own_name_says(elsewhere, text, expected):
    (elsewhere / "mine/my-recipe.toml").write_text(text)
    assert places(load_recipe("mine/my-recipe.toml")) == expected
    assert load_recipe("mine/my-recipe.toml", ["run.out='z'"]).run.out == "z"


def test_a_name_that_no_run_may_have_is_mended(elsewhere):
    (elsewhere / "mine/.é:x.toml").write_text(CHILD)
    recipe = load_recipe("mine/.é:x.toml")
    assert (recipe.run.name, recipe.run.out) == ("x", "runs/.é:x")


def test_what_extends_cannot_find_is_said_at_its_line(elsewhere):
    (elsewhere / "x.toml").write_text('\nextends = "dedistill:flux_schnel"\n')
    with pytest.raises(Exception, match=r"^x\.toml:2: extends: dedistill:flux_schnel: no recipe of this name.*did you mean"):
        load_recipe("x.toml")
    (elsewhere / "x.toml").write_text('extends = "recipes/flux_schnell.toml"\n')
    with pytest.raises(Exception, match=r"^x\.toml:1: extends: .*no such file, did you mean 'dedistill:flux_schnell'"):
        load_recipe("x.toml")
