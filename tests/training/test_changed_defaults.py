"""A default that another version changes never changes a run that was started before it."""

import json
from copy import deepcopy
from dataclasses import replace
from functools import reduce
from operator import getitem
from pathlib import Path

import pytest
from test_run import run, same, weights

from dedistill.errors import UserError
from dedistill.models.pixel_flux import SPEC
from dedistill.recipe import Recipe, load_recipe
from dedistill.recipe.data_tables import Data
from dedistill.recipe.fields import Default
from dedistill.recipe.model_tables import Adapter
from dedistill.recipe.schema import Timesteps, Train, Validate
from dedistill.runs.directory import FREE_TO_CHANGE, RunDirectory, flat
from dedistill.train import main


@pytest.fixture
def changed(monkeypatch):
    """Another version of the program, in which the default of a key is another one."""
    plain = []

    def change(table, name: str, value):
        field = table.model_fields[name]
        if field.metadata and any(isinstance(m, Default) for m in field.metadata):
            others = [Default(value, m.key, m.among) if isinstance(m, Default) else m for m in field.metadata]
            monkeypatch.setattr(field, "metadata", others)
        else:
            plain.append((table, field, field.default))
            field.default = value
            table.model_rebuild(force=True)
            Recipe.model_rebuild(force=True)

    yield change
    for table, field, value in plain:
        field.default = value
        table.model_rebuild(force=True)
        Recipe.model_rebuild(force=True)


def refusal(recipe: Path, out: Path, capsys, *settings: str) -> str:
    capsys.readouterr()
    arguments = [a for s in (f"run.out={out}", *settings) for a in ("--set", s)]
    assert main([str(recipe), *arguments]) == 1
    return capsys.readouterr().err


def as_before_resolving(out: Path) -> None:
    """recipe.json as versions wrote it that left defaults out: none in their place."""
    file = out / "recipe.json"
    table = json.loads(file.read_text())
    table["data"]["caption_dropout"] = table["model"]["text_length"] = table["timesteps"]["alpha"] = None
    table["timesteps"]["beta"] = table["adapter"]["init_scale"] = table["adapter"]["targets"][0]["rank"] = None
    file.write_text(json.dumps(table))


CHANGES = [
    ((Data, "caption_dropout", 0.9), "data.caption_dropout: 0.1 there, 0.9 here by default"),
    ((Adapter, "init_scale", 0.5), "adapter.init_scale: 0.001 there, 0.5 here by default"),
    ((Timesteps, "alpha", 3.0), "timesteps.alpha: 2.0 there, 3.0 here by default"),
    ((Train, "spike", 30.0), "train.spike: 20.0 there, 30.0 here by default"),
]


@pytest.mark.parametrize("written", ["resolved", "with none"])
def test_a_changed_default_is_refused_or_the_run_keeps_its_own(adapter_recipe, tmp_path, changed, capsys, written):
    whole = run(adapter_recipe, tmp_path / "whole")
    cut = run(adapter_recipe, tmp_path / "cut", "train.steps=4")
    if written == "with none":
        as_before_resolving(cut)
    for change, _ in CHANGES:
        changed(*change)
    told = refusal(adapter_recipe, cut, capsys)
    for _, message in CHANGES:
        assert message in told
    kept = ["data.caption_dropout=0.1", "adapter.init_scale=1e-3", "timesteps.alpha=2.0"]
    assert [m for _, m in CHANGES if m in refusal(adapter_recipe, cut, capsys, *kept)] == [CHANGES[-1][1]]
    run(adapter_recipe, cut, *kept, "train.spike=20.0")
    assert same(weights(whole), weights(cut))


def test_a_family_default_that_changed_is_refused(adapter_recipe, tmp_path, monkeypatch, capsys):
    cut = run(adapter_recipe, tmp_path / "cut", "train.steps=2")
    as_before_resolving(cut)
    changed = replace(SPEC, defaults=lambda model: {"model.text_length": 9})
    monkeypatch.setattr("dedistill.models.pixel_flux.SPEC", changed)
    assert "model.text_length: 12 there, 9 here by default" in refusal(adapter_recipe, cut, capsys)
    run(adapter_recipe, cut, "model.text_length=12")


def test_a_run_of_an_older_version_goes_on(adapter_recipe, tmp_path):
    """Nothing changed, nothing is asked: none meant these numbers. From now on they are recorded."""
    whole = run(adapter_recipe, tmp_path / "whole")
    cut = run(adapter_recipe, tmp_path / "cut", "train.steps=4")
    as_before_resolving(cut)
    run(adapter_recipe, cut)
    assert same(weights(whole), weights(cut))
    assert json.loads((cut / "recipe.json").read_text())["data"]["caption_dropout"] == 0.1


def test_a_default_that_is_free_to_change_is_told(teacher_recipe, tmp_path, changed, capsys):
    out = run(teacher_recipe, tmp_path / "a", "validate.every=2")
    changed(Validate, "samples", 8)
    capsys.readouterr()
    run(teacher_recipe, out, "validate.every=2", "train.steps=6")
    assert "validate.samples = 8 here by default; until now the run had 256" in capsys.readouterr().err
    run(teacher_recipe, out, "validate.every=2", "train.steps=8", "validate.samples=16")
    assert "by default" not in capsys.readouterr().err


def test_the_recipe_in_the_run_directory_is_the_one_that_was_used(teacher_recipe, tmp_path):
    """Read back under any version, it says the same."""
    out = run(teacher_recipe, tmp_path / "a", "train.schedule=cosine")
    back = load_recipe(out / "recipe.toml")
    assert back.resolved() == json.loads((out / "recipe.json").read_text()) and back.train.lr_floor == 0.0


ALWAYS_THERE = {
    *(
        "model.text_length",
        "adapter.init_scale",
        "data.resolutions",
        "data.crops",
        "data.crops_per_picture",
        "data.max_upscale",
    ),
    *("data.missing_captions", "data.split_lines", "data.caption_dropout", "timesteps.alpha", "timesteps.beta", "sample.shift"),
}
"""Keys of the first versions, which left them out of recipe.json where they were not set. No later key may be among them."""


@pytest.mark.parametrize("name", ["dedistill:flux_schnell_24gb", "dedistill:sdxl_lora", "dedistill:digits/dedistill"])
def test_a_run_begun_before_a_key_existed_is_refused_by_it_or_trains_as_it_did(name, tmp_path):
    recipe = load_recipe(name, [f"run.out={tmp_path / 'run'}"])
    folder, now = RunDirectory(recipe), recipe.resolved()
    folder.path.mkdir()
    folder.metrics.write_text('{"step": 1}\n')
    refused = []
    for key, value in flat(now).items():
        older = deepcopy(now)
        *tables, last = key.split(".")
        del reduce(getitem, tables, older)[last]
        (folder.path / "recipe.json").write_text(json.dumps(older))
        try:
            folder.check()
        except UserError as e:
            assert f"  {key}: " in str(e)
            refused.append(key)
        else:
            assert value is None or key in ALWAYS_THERE or key.startswith(FREE_TO_CHANGE) or key == "train.steps"
    assert {"train.optimizer", "train.spike", "timesteps.stratify", "data.caption_noise", "model.prediction"} <= set(refused)
