"""What a model folder says of itself: true after a full training, a merge and an export, and heeded by those who load it."""

import json
import shutil

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dedistill.errors import UserError
from dedistill.models.flux.pipeline import MaskedFluxPipeline
from dedistill.models.flux.tiny import write_tiny_flux
from dedistill.recipe import load_recipe
from dedistill.release.export import export_model, load_int8
from dedistill.release.merge import merge_adapter
from dedistill.train import main

RECIPE = """
[run]
name = "facts"
out = "{out}/{name}"
[model]
family = "flux"
path = "{base}"
text_length = 64
{model}
[data]
source = "pictures"
cache = "{out}/cache"
resolutions = [64]
[[data.sets]]
path = "{images}"
[train]
steps = 2
batch = 2
lr = 1e-3
[snapshot]
every = 1
"""
LOKR = '[adapter]\nkind = "lokr"\ninit = "perturbed_normal"\n[[adapter.targets]]\npreset = "modulation"\n'
LORA = '[adapter]\nkind = "lora"\ninit = "perturbed_normal"\n[[adapter.targets]]\npreset = "modulation"\nrank = 2\n'


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two bases like dev, images, a full training that passes the guidance by, a LoKr and a LoRA on the first base."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("facts")
    for name, seed in (("base", 0), ("other", 1)):
        write_tiny_flux(folder / name, guidance=True, seed=seed)
    (folder / "images").mkdir()
    for i in range(3):
        Image.new("RGB", (70, 64), (80 * i, 40, 200)).save(folder / f"images/{i}.png")
        (folder / f"images/{i}.txt").write_text(f"colour {i}")
    bypass = 'guidance = "bypass"\nmask = "none"\nt5_mask = false'
    for name, base, model, table in (
        ("full", "base", bypass, ""),
        ("lokr", "base", "", LOKR),
        ("lora", "base", "", LORA),
        ("elsewhere", "other", "", LOKR),
    ):
        given = {"out": folder, "name": name, "base": folder / base, "images": folder / "images"}
        # another base: another cache for its text
        text = RECIPE.format(**given, model=model).replace("/cache", f"/cache-{base}-{bool(model)}") + table
        (folder / f"{name}.toml").write_text(text)
        if name != "elsewhere":
            assert main([str(folder / f"{name}.toml"), "--debug"]) == 0
    return folder


def snapshot(home, name):
    return home / name / "snapshots" / "step-00000002.safetensors"


def facts(folder) -> dict:
    return json.loads((folder / "dedistill.json").read_text())


def test_a_full_training_says_how_it_was_made(home, tmp_path):
    """Base, guidance, masks and recipe reach the header and the card."""
    found = facts(home / "full/model")
    assert found["base"]["path"] == str(home / "base") and found["guidance"] == "bypassed"
    assert (found["mask"], found["t5_mask"], found["text_length"]) == ("none", False, 64)
    assert [t["step"] for t in found["trained"]] == [2] and 'name = "facts"' in found["trained"][0]["recipe"]
    export_model(home / "full/model", tmp_path / "single", "single")
    with safe_open(tmp_path / "single/single.safetensors", "pt") as f:
        header = f.metadata()
    assert header["dedistill.guidance"] == "bypassed" and 'name = "facts"' in header["dedistill.recipe"]
    assert json.loads(header["dedistill.base"])["path"] == "base"
    assert header["modelspec.resolution"] == "64x64"
    text = (tmp_path / "single/README.md").read_text()
    assert "was bypassed in training" in text and "| train.steps | 2 |" in text and "does not say how" not in text


def test_guidance_of_the_training_is_that_of_the_pipeline(home, tmp_path):
    """A model that was fed 1 is fed 1, one that passed it by passes it by, until something else is asked for."""

    def drawn(folder, **settings):
        pipe = MaskedFluxPipeline.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        latents = torch.linspace(-1, 1, 8 * 64).reshape(1, 8, 64)
        kind = {"num_inference_steps": 2, "output_type": "latent", "height": 32, "width": 64, "latents": latents}
        return pipe("a red cat", **kind, **settings).images

    merge_adapter(load_recipe(home / "lokr.toml"), snapshot(home, "lokr"), tmp_path / "merged", dtype="fp32")
    for source in (home / "full/model", tmp_path / "merged"):
        export_model(source, tmp_path / "out", "diffusers")
        default, one, other = (drawn(tmp_path / "out", **s) for s in ({}, {"guidance_scale": 1.0}, {"guidance_scale": 3.5}))
        passed = source.name == "model"
        assert torch.equal(default, one) != passed and not torch.equal(default, other)
        if passed:  # the embedder is not looked at
            file = tmp_path / "out/transformer/diffusion_pytorch_model.safetensors"
            tensors = load_file(file)
            changed = {n: t + 1 if "guidance_embedder" in n else t for n, t in tensors.items()}
            save_file(changed, file, metadata={"format": "pt"})
            assert torch.equal(drawn(tmp_path / "out"), default)
        shutil.rmtree(tmp_path / "out")


def test_weights_are_merged_where_they_belong(home, tmp_path):
    """Another base, or another form of adapter, is an error; a base that was moved is not."""
    other, lora = load_recipe(home / "elsewhere.toml"), load_recipe(home / "lora.toml")
    with pytest.raises(UserError, match=r"was trained on '.*base', the recipe's model\.path is '.*other'"):
        merge_adapter(other, snapshot(home, "lokr"), tmp_path / "no")
    with pytest.raises(UserError, match="is a lokr, the recipe's adapter a lora"):
        merge_adapter(lora, snapshot(home, "lokr"), tmp_path / "no")
    assert not (tmp_path / "no").exists()
    shutil.copytree(home, tmp_path / "copy", ignore=shutil.ignore_patterns("full", "cache*"))
    (tmp_path / "copy/base").rename(tmp_path / "copy/moved")
    text = (home / "lokr.toml").read_text().replace(str(home / "base"), str(tmp_path / "copy/moved"))
    (tmp_path / "moved.toml").write_text(text)
    (home / "base").rename(home / "away")
    try:
        merge_adapter(load_recipe(tmp_path / "moved.toml"), snapshot(home, "lokr"), tmp_path / "yes")
    finally:
        (home / "away").rename(home / "base")


def test_provenance_goes_through_a_single_file(home, tmp_path):
    """Base -> merge -> BFL file -> merge: both merges, and the first base."""
    merge_adapter(load_recipe(home / "lokr.toml"), snapshot(home, "lokr"), tmp_path / "first", dtype="fp32")
    export_model(tmp_path / "first", tmp_path / "bfl", "bfl")
    text = (home / "lokr.toml").read_text()
    text = text.replace(f'path = "{home / "base"}"', f'path = "{tmp_path}/bfl/bfl.safetensors"\ncomponents = "{home / "base"}"')
    (tmp_path / "second.toml").write_text(text.replace(f'out = "{home}/lokr"', f'out = "{tmp_path}/second"'))
    assert main([str(tmp_path / "second.toml"), "--debug"]) == 0
    recipe = load_recipe(tmp_path / "second.toml")
    merge_adapter(recipe, tmp_path / "second/snapshots/step-00000002.safetensors", tmp_path / "both", dtype="fp32")
    found = facts(tmp_path / "both")
    assert found["base"]["path"] == "base" and len(found["merges"]) == 2


def test_int8_export_is_never_taken_for_weights(home, tmp_path):
    """By no program: diffusers misses its weights, ours says what to do, training says what to train on."""
    merge_adapter(load_recipe(home / "lokr.toml"), snapshot(home, "lokr"), tmp_path / "merged", dtype="fp32")
    export_model(tmp_path / "merged", tmp_path / "int8", "int8")
    with pytest.raises(UserError, match="load_int8"):
        MaskedFluxPipeline.from_pretrained(tmp_path / "int8")
    with pytest.raises(OSError, match=r"no file named diffusion_pytorch_model"):
        FluxTransformer2DModel.from_pretrained(tmp_path / "int8/transformer")
    pipe = FluxPipeline.from_pretrained(tmp_path / "int8", transformer=load_int8(tmp_path / "int8"))
    assert pipe.transformer.x_embedder.weight.dtype == torch.int8
    text = (home / "lokr.toml").read_text().replace(f'path = "{home / "base"}"', f'path = "{tmp_path}/int8"')
    (tmp_path / "x.toml").write_text(text)
    assert main([str(tmp_path / "x.toml")]) == 1


def test_other_masks_than_the_weights_know_are_told(home, tmp_path, capsys):
    """Changing them is allowed, and said before training."""
    text = (home / "lokr.toml").read_text().replace(str(home / "base"), str(home / "full/model"))
    (tmp_path / "x.toml").write_text(text.replace(f'out = "{home}/lokr"', f'out = "{tmp_path}/x"'))
    assert main([str(tmp_path / "x.toml")]) == 0
    said = capsys.readouterr().err
    assert "model.mask = 'bool' here;" in said and "was trained with 'none'" in said and "model.t5_mask = True here" in said
