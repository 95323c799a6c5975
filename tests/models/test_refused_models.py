"""What a family cannot do, or is not its own, is one clear error before anything is read or encoded for it."""

import itertools
import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dedistill.cli.main import main
from dedistill.data.encode import open_data
from dedistill.errors import UserError
from dedistill.models.family import Components
from dedistill.models.model import Model, check_asked, sampled_shape
from dedistill.models.registry import adapter_family, check_adapter_family, families, get_family, get_spec
from dedistill.recipe import Recipe, load_recipe
from dedistill.recipe.resolve import recipe_of
from dedistill.release.merge import merge_adapter

PAIRS = list(itertools.permutations(families(), 2))
PIPELINES = [name for name in families() if get_spec(name).full_config]
every_pair = pytest.mark.parametrize(("here", "there"), PAIRS)


def recipe(family: str, path: Path | str = "none", **tables) -> Recipe:
    plain = {"run": {"name": "a", "out": "a"}, "data": {"source": "digits"}, "train": {"steps": 1, "batch": 1, "lr": 1e-3}}
    given = {"model": {"family": family, "path": str(path)}} | tables
    return recipe_of(plain | {key: plain.get(key, {}) | value for key, value in given.items()})


# --- adapters of another family --------------------------------------------------------------------------------------


@every_pair
def test_adapters_of_another_family_are_known_by_their_headers(here, there):
    """By our own word in it, or by the architecture that another program wrote."""
    spec, other = get_spec(here), get_spec(there)
    known = [other.architecture, *(published.architecture for published in other.published)]
    for header in ({"dedistill.family": there}, *({"modelspec.architecture": f"{name}/lora"} for name in known)):
        assert adapter_family(header) == there
        with pytest.raises(UserError, match=f"'mine' is an adapter of {there}, and the model is one of {here}"):
            check_adapter_family(header, spec, "mine")
        check_adapter_family(header, other, "mine")


@pytest.mark.parametrize("header", [{}, {"modelspec.architecture": "unheard-of/lora"}, {"ss_base_model_version": "x"}])
def test_adapters_that_do_not_say_are_tried(header):
    for name in families():
        check_adapter_family(header, get_spec(name), "mine")


@pytest.mark.parametrize("header", [{"dedistill.family": "sd3"}, {"modelspec.architecture": "stable-diffusion-v1/lora"}])
def test_no_command_takes_them(header, image_recipe, tiny_flux, tmp_path, capsys):
    """Although every tensor has a layer of that name and shape here."""
    name = "transformer.transformer_blocks.0.attn.to_q"
    tensors = {f"{name}.lora_A.weight": torch.ones(2, 32), f"{name}.lora_B.weight": torch.ones(32, 2)}
    file = tmp_path / "mine.safetensors"
    save_file(tensors, file, metadata=header)
    said = f"is an adapter of {adapter_family(header)}, and the model is one of flux"
    made = load_recipe(image_recipe)
    with pytest.raises(UserError, match=said):
        merge_adapter(made, file, tmp_path / "merged")
    with pytest.raises(UserError, match=said):
        Model(get_family("flux"), None, torch.nn.Linear(1, 1), 0).load_file(file, made)
    for words in (["export", str(file), "--format", "peft", "--out", str(tmp_path / "b.safetensors")], ["check", str(file)]):
        assert main([*words, "--model", str(tiny_flux)]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "merged").exists() and not (tmp_path / "b.safetensors").exists()


# --- folders of another family ---------------------------------------------------------------------------------------


def folder_of(name: str, place: Path) -> Path:
    """As much of a model folder as tells whose it is."""
    spec = get_spec(name)
    config = spec.full_config("", False) if spec.full_config else {"_class_name": next(iter(spec.networks))}
    (place / spec.folder).mkdir(parents=True)
    (place / spec.folder / "config.json").write_text(json.dumps(config))
    if not spec.full_config:
        (place / "dedistill.json").write_text(json.dumps({"family": name}))
    return place


@every_pair
def test_folders_of_another_family_are_named(here, there, tmp_path):
    """Whether a start asks, or plan and rehearse for the shapes alone."""
    folder, family = folder_of(there, tmp_path), get_family(here)
    table = recipe(here, folder).model
    alike = {here, there} == {"flux", "pixel_flux"} and here == "pixel_flux"  # by its files a pipeline's is no model of ours
    said = "no pixel_flux model in" if alike else f"of {there}, not of {here}; set model.family = '{there}'"
    for asked in (lambda: family.load(table, seed=0, denoiser=False), lambda: family.full_size(table)):
        with pytest.raises(UserError, match=rf"^model\.path: .*{said}"):
            asked()


# --- what a family does not have -------------------------------------------------------------------------------------


NOT_THERE = [
    *((name, "sample.guidance", 3.5, "has no guidance embedding") for name in PIPELINES),
    *((name, "sample.negative", "<image:a.jpg> blue", "names an image") for name in PIPELINES),
    *((name, "preview.prompts", ["a", "two <image:a.jpg>"], "names an image") for name in PIPELINES),
    *(
        (name, "model.image_prompts", "redux", "cannot be told images")
        for name in PIPELINES
        if not get_spec(name).image_prompts
    ),
    *((name, "train.objective", "diffusion", "is a flow model") for name in PIPELINES if get_spec(name).prediction == "flow"),
    ("sd3", "sample.height", 6160, "places for 6144 pixels"),
]


@cache
def shapes_of(name: str) -> Components:
    return get_family(name).full_size(recipe(name).model)


@pytest.mark.parametrize(("name", "key", "value", "said"), NOT_THERE)
def test_what_a_model_does_not_have_is_refused_with_the_key(name, key, value, said):
    """By names and shapes alone."""
    table, _, field = key.partition(".")
    tables = {"model": {"family": name, "path": "none"}, "sample": {"height": 1024, "width": 1024}, "preview": {}}
    made = recipe(name, **{**tables, table: tables.get(table, {}) | {field: value}})
    with pytest.raises(UserError, match=rf"{key}: .*{said}"):
        check_asked(made, get_family(name), shapes_of(name))
        sampled_shape(made, get_family(name), shapes_of(name))


@pytest.mark.parametrize(
    ("key", "value"), [("model.mask", "bool"), ("model.t5_mask", "true"), ("model.guidance", "2.0"), ("sample.guidance", "2.0")]
)
@pytest.mark.parametrize("name", [name for name in PIPELINES if name != "flux"])
def test_nothing_is_encoded_before(name, key, value, image_recipe, tmp_path):
    """For masks and guidance that would be ignored."""
    family, folder = get_family(name), tmp_path / "model"
    family.write_tiny(recipe(name).model, folder, None, full_depth=False)
    text = image_recipe.read_text().replace('"flux"', f'"{name}"').replace("text_length = 64\n", "")
    lines = [f'path = "{folder}"' if line.startswith('path = "') and "flux" in line else line for line in text.splitlines()]
    image_recipe.write_text("\n".join(lines))
    with pytest.raises(UserError, match=rf"{key}: "):
        open_data(load_recipe(image_recipe, [f"{key}={value!r}" if value == "bool" else f"{key}={value}"]), "cpu", print)
    assert not list(tmp_path.rglob("cache/**/*.safetensors"))
