"""Defaults that a family gives by the [model] table alone, before any weights are read."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from dedistill.models.flux.tiny import write_tiny_flux
from dedistill.models.network_files import PREFIX
from dedistill.models.registry import families, get_family
from dedistill.recipe.model_tables import Model
from dedistill.recipe.resolve import recipe_of

COMMIT = "0a" * 20


def resolved(path: Path | str, family: str = "flux", **model):
    return recipe_of(
        {
            "run": {"name": "a", "out": "a"},
            "model": {"family": family, "path": str(path), **model},
            "data": {"source": "pictures", "sets": [{"path": "a"}], "cache": "a"},
            "train": {"steps": 1, "batch": 1, "lr": 1e-3},
        }
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[bool, Path]:
    home = tmp_path_factory.mktemp("models")
    for guided in (False, True):
        write_tiny_flux(home / str(guided), guidance=guided)
    return {guided: home / str(guided) for guided in (False, True)}


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("form", ["folder", "file", "file with a prefix"])
def test_the_resolved_number_is_the_one_the_network_is_fed(folders, tmp_path, guided, form):
    """And none where there is nothing to feed, in training and in images."""
    place = folders[guided]
    if form != "folder":
        (file,) = (place / "transformer").glob("*.safetensors")
        prefix = PREFIX if "prefix" in form else ""
        place = tmp_path / "net.safetensors"
        save_file({prefix + name: tensor for name, tensor in load_file(file).items()}, place)
    recipe = resolved(place, components=None if form == "folder" else str(folders[guided]))
    assert recipe.model.guidance == recipe.sample.guidance == (1.0 if guided else None)
    components = get_family("flux").load(recipe.model, seed=0)
    assert components.guidance == recipe.model.guidance
    assert components.text_length == recipe.model.text_length == 512
    assert get_family("flux").latent_shape(components, recipe.sample.height, recipe.sample.width) == components.sample_shape


@pytest.mark.parametrize(
    ("path", "wanted"),
    [("black-forest-labs/FLUX.1-dev", 1.0), ("ostris/OpenFLUX.1", None), ("/none", None)],
)
def test_without_files_the_table_of_published_models_tells(path, wanted):
    assert resolved(path, revision=COMMIT if "/" in path[1:] else None).model.guidance == wanted


def test_images_are_made_with_what_training_is_fed_unless_the_recipe_says_otherwise(folders):
    assert resolved(folders[True], guidance=2.5).sample.guidance == 2.5
    assert resolved(folders[True], guidance="bypass").sample.guidance is None


def test_every_family_has_its_numbers():
    for name in families():
        length = resolved("a", name).model.text_length
        assert 1 <= length <= get_family(name).max_text_length, name
        assert Model(family=name).text_length is None


def test_a_hub_id_by_its_config_and_without_torch(tmp_path):
    """The config comes from the cache; reading a recipe of this family loads nothing heavy."""
    config = tmp_path / "models--someone--tuned-dev" / "snapshots" / COMMIT / "transformer" / "config.json"
    config.parent.mkdir(parents=True)
    config.write_text(json.dumps({"num_layers": 2, "num_single_layers": 4, "guidance_embeds": True}))
    code = """
import sys
from dedistill.models.registry import family_defaults
from dedistill.recipe.model_tables import Model
ids = "someone/tuned-dev", "someone/else"
found = [family_defaults(Model(family="flux", path=path, revision=sys.argv[1])) for path in ids]
print([f.get("model.guidance") for f in found], [m for m in ("torch", "diffusers", "transformers") if m in sys.modules])
"""
    env = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    out = subprocess.run([sys.executable, "-c", code, COMMIT], env=env, capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[1.0, None] []"
