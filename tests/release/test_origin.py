"""Adapters of other programs: whether they say which base they are for, and that another one is noticed."""

import pytest
from safetensors.torch import save_file
from test_merge import recipe_for, trained

from dedistill.cli.main import main
from dedistill.models.flux.tiny import write_tiny_flux
from dedistill.recipe import to_toml


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"modelspec.architecture": "flux-1-dev/lora"}, "trained on flux-1-dev, and the base is flux-1-schnell"),
        ({"modelspec.architecture": "flux-1-schnell/lora", "ss_steps": "7"}, ""),
        ({"ss_base_model_version": "flux1"}, "does not say which base"),
        ({}, "does not say which base"),
        ({"dedistill.recipe": "own"}, ""),
    ],
)
def test_merge_and_export_say_what_is_known_of_the_origin(header, said, tmp_path, capsys):
    base = tmp_path / "FLUX.1-schnell"
    write_tiny_flux(base)
    recipe = recipe_for(tmp_path / "a", base, "flux", "lora")
    header = {k: to_toml(recipe) if v == "own" else v for k, v in header.items()}
    file = tmp_path / "a.safetensors"
    save_file(trained(recipe, file).tensors(), file, metadata={"format": "pt", **header})
    commands = [
        ["merge", str(tmp_path / "a" / "recipe.toml"), "--weights", str(file), "--out", str(tmp_path / "out")],
        ["export", str(file), "--format", "peft", "--model", str(base), "--out", str(tmp_path / "p.safetensors")],
    ]
    for command in commands:
        assert main(command) == 0
        told = capsys.readouterr().err
        assert said in told and ("its shapes fit" in told) == bool(said)
