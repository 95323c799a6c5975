"""Merging: the network with the adapter, the merged network, and the merged network read again are one."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dedistill.adapters.delta import weight_change
from dedistill.adapters.formats import as_kohya, as_transformer, by_layer
from dedistill.adapters.targets import adaptable
from dedistill.errors import UserError
from dedistill.flow import keyed
from dedistill.models.flux.naming import NAMES as naming
from dedistill.models.model import build_model
from dedistill.models.quantize import linear_names
from dedistill.recipe import load_recipe
from dedistill.recipe.model_tables import Model
from dedistill.release.folder import Denoiser
from dedistill.release.merge import RoundingStats, merge_adapter, round_stochastic

RECIPE = """
[run]
name = "a"
out = "{folder}/run"
[model]
family = "{family}"
path = "{base}"
{more}
[adapter]
kind = "{kind}"
[[adapter.targets]]
pattern = "**"
{size}
[data]
source = "digits"
[train]
steps = 1
batch = 1
lr = 1e-3
"""
TOOLS = Path(__file__).parent.parent.parent / "tools"
FORMS = {"lokr": "factor = 4", "lokr-rank": "factor = 4\nrank = 2", "lora": "rank = 2"}


def write_base(family: str, folder, dtype=torch.float32):
    from dedistill.models.registry import get_family

    get_family(family).write_tiny(Model(family=family, path="tiny"), folder, None, full_depth=False)
    for file in (folder / "transformer").glob("*.safetensors"):
        save_file({n: t.to(dtype) for n, t in load_file(file).items()}, file, metadata={"format": "pt"})
    return folder


def recipe_for(folder, base, family="pixel_flux", form="lokr", more=""):
    folder.mkdir(exist_ok=True)
    file = folder / "recipe.toml"
    text = RECIPE.format(folder=folder, base=base, family=family, kind=form.split("-")[0], size=FORMS[form], more=more)
    file.write_text(text)
    return load_recipe(file)


def trained(recipe, file, size=0.1, seed=0):
    """The recipe's model with factors drawn at random, saved as a snapshot."""
    model = build_model(recipe)
    with torch.no_grad():
        for name, p in model.trainable().items():
            p.copy_(torch.from_numpy(keyed.generator(seed, name).standard_normal(tuple(p.shape), dtype="float32")) * size)
    save_file(model.tensors(), file, metadata={"format": "pt", "dedistill.step": "7"})
    return model


@torch.no_grad()
def answer(model) -> torch.Tensor:
    text = model.encode(["two then three", "one"])
    noisy = keyed.noise(0, "question", 0, range(2), (model.components.sample_shape[0], 8, 16))
    return model.velocity(noisy, torch.tensor([0.3, 0.8]), text)


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def alone(recipe, path):
    """The network in folder ``path``, without an adapter."""
    spec = recipe.model.model_copy(update={"path": str(path)})
    return build_model(recipe.model_copy(update={"model": spec, "adapter": None}))


@pytest.mark.parametrize(("form", "family"), [*((form, "pixel_flux") for form in FORMS), ("lokr-rank", "flux")])
def test_merged_reloaded_and_adapted_are_one(form, family, tmp_path):
    """To 1e-6 in fp32, every linear of the network adapted."""
    recipe = recipe_for(tmp_path / "a", write_base(family, tmp_path / "base"), family, form)
    model = trained(recipe, tmp_path / "a.safetensors")
    assert len(model.targets) == len(linear_names(model.components.denoiser))
    wanted, before = answer(model), answer(alone(recipe, recipe.model.path))
    assert relative(before, wanted) > 1e-2
    merged = merge_adapter(recipe, tmp_path / "a.safetensors", tmp_path / "out", dtype="fp32")
    assert relative(answer(alone(recipe, tmp_path / "out")), wanted) < 1e-6
    assert abs(merged.total.facts()["kept"] - 1) < 1e-5 and merged.layers.keys() == model.adapter.by_target.keys()


def test_other_spellings_merge_to_the_same_bytes(tmp_path):
    recipe = recipe_for(tmp_path / "a", write_base("pixel_flux", tmp_path / "base"))
    model = trained(recipe, tmp_path / "a.safetensors")
    layers = by_layer(model.tensors(), adaptable(model.components.denoiser), "a")
    save_file(as_transformer(layers), tmp_path / "b.safetensors")
    for name in "ab":
        merge_adapter(recipe, tmp_path / f"{name}.safetensors", tmp_path / f"out-{name}")
    a, b = (next((tmp_path / f"out-{n}" / "transformer").glob("*.safetensors")).read_bytes() for n in "ab")
    assert a == b


def test_a_kohya_file_merges_to_the_same_bytes(tmp_path):
    recipe = recipe_for(tmp_path / "a", write_base("flux", tmp_path / "base"), "flux", "lora")
    model = trained(recipe, tmp_path / "a.safetensors")
    shapes = adaptable(model.components.denoiser)
    save_file(as_kohya(by_layer(model.tensors(), shapes, "a"), naming, shapes), tmp_path / "b.safetensors")
    merged = [merge_adapter(recipe, tmp_path / f"{name}.safetensors", tmp_path / f"out-{name}") for name in "ab"]
    a, b = (next((tmp_path / f"out-{n}" / "transformer").glob("*.safetensors")).read_bytes() for n in "ab")
    assert a == b and merged[0].layers.keys() == merged[1].layers.keys() == model.adapter.by_target.keys()


def test_merging_again_on_top(tmp_path):
    """A new adapter on the merged base starts where the old one ended; the chain of both is kept."""
    base = write_base("pixel_flux", tmp_path / "base")
    first = recipe_for(tmp_path / "a", base)
    wanted = answer(trained(first, tmp_path / "a.safetensors"))
    merge_adapter(first, tmp_path / "a.safetensors", tmp_path / "one", dtype="fp32")
    second = recipe_for(tmp_path / "b", tmp_path / "one", form="lora")
    assert relative(answer(build_model(second)), wanted) < 1e-6
    wanted = answer(trained(second, tmp_path / "b.safetensors", seed=1))
    merge_adapter(second, tmp_path / "b.safetensors", tmp_path / "two", dtype="fp32")
    assert relative(answer(alone(second, tmp_path / "two")), wanted) < 1e-6
    facts = json.loads((tmp_path / "two" / "dedistill.json").read_text())
    assert facts["base"]["path"] == str(base) and facts["family"] == "pixel_flux"
    assert [m["adapter"] for m in facts["merges"]] == [str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]
    assert facts["merges"][0]["into_sha256"] == facts["base"]["sha256"] != facts["merges"][1]["into_sha256"]
    assert facts["merges"][0]["adapter_header"]["dedistill.step"] == "7" and "[adapter]" in facts["merges"][0]["recipe"]


@pytest.mark.parametrize(("size", "nearest"), [(1e-3, (0.75, 0.82)), (1e-2, (0.12, 0.22))])
def test_what_rounding_loses(size, nearest):
    """At 1e-3 of the weight, nearest leaves most entries where they were; stochastic keeps it all."""
    weight = keyed.noise(0, "w", 0, [0], (512, 512))[0].bfloat16()
    delta = keyed.noise(0, "d", 0, [0], (512, 512))[0] * size
    total = weight.float() + delta
    lost = RoundingStats.measure(weight, total.bfloat16(), delta).facts()
    assert nearest[0] < lost["zeros"] < nearest[1]
    assert (0.4 < lost["kept"] < 0.6) if size == 1e-3 else lost["kept"] > 0.95
    kept = RoundingStats.measure(weight, round_stochastic(total, 0, "w"), delta).facts()
    assert abs(kept["kept"] - 1) < 0.02
    assert RoundingStats.measure(weight.float(), total, delta).facts()["error"] < 1e-3


def test_stochastic_rounding_is_right_on_average_and_keyed():
    values = torch.tensor([1.0 + 2**-9, -3.14159, 1e-30, 0.0, 1.5, float("inf"), -float("inf"), 3.3e38])
    draws = torch.stack([round_stochastic(values, 0, str(i)) for i in range(1000)]).float()
    assert torch.equal(round_stochastic(values, 0, "a"), round_stochastic(values, 0, "a"))
    assert len(draws[:, 0].unique()) == 2, "between two neighbours both occur"
    assert (draws[:, 3:7] == values[3:7]).all(), "what bfloat16 holds stays"
    step = 2.0**-7
    for column in (0, 1, 2):
        width = abs(float(values[column])) * step
        assert abs(float(draws[:, column].mean() - values[column])) < 4 * width / 1000**0.5
    assert round_stochastic(torch.tensor([float("nan")]), 0, "n").isnan().all()
    big = keyed.noise(0, "big", 0, [0], (3000, 1500))[0]
    once = round_stochastic(big.T, 1, "t")
    assert once.shape == (1500, 3000) and relative(once.float(), big.T) < 0.01


def test_merge_into_bf16_is_deterministic_and_leaves_the_rest_alone(tmp_path):
    """The base's other tensors keep their bytes; two merges give the same file; another seed gives another."""
    base = write_base("flux", tmp_path / "base", torch.bfloat16)
    recipe = recipe_for(tmp_path / "a", base, "flux")
    model = trained(recipe, tmp_path / "a.safetensors", size=0.02)
    merge_adapter(recipe, tmp_path / "a.safetensors", tmp_path / "one")
    merge_adapter(recipe, tmp_path / "a.safetensors", tmp_path / "two")
    reseeded = recipe.model_copy(update={"run": recipe.run.model_copy(update={"seed": 1})})
    merge_adapter(reseeded, tmp_path / "a.safetensors", tmp_path / "three")
    before, one, two, three = (Denoiser(tmp_path / n) for n in ("base", "one", "two", "three"))
    deltas = {n: weight_change(f) for n, f in by_layer(model.tensors(), adaptable(one.skeleton()), "a").items()}
    assert one.layout.keys() == before.layout.keys() and all(d == torch.bfloat16 for _, d in one.layout.values())
    for name in before.layout:
        assert torch.equal(one[name], two[name])
        if name.removesuffix(".weight") in deltas and name.endswith(".weight"):
            exact = before[name].float() + deltas[name.removesuffix(".weight")]
            assert ((one[name].float() - exact).abs() <= exact.abs() * 2**-7).all()
        else:
            assert torch.equal(one[name], before[name]), name
    assert any(not torch.equal(one[n], three[n]) for n in before.layout)


def test_shards_hold_the_same_network(tmp_path):
    recipe = recipe_for(tmp_path / "a", write_base("pixel_flux", tmp_path / "base"))
    trained(recipe, tmp_path / "a.safetensors")
    merge_adapter(recipe, tmp_path / "a.safetensors", tmp_path / "one", dtype="fp32")
    merge_adapter(recipe, tmp_path / "a.safetensors", tmp_path / "many", dtype="fp32", shard_bytes=20_000)
    files = sorted((tmp_path / "many" / "transformer").glob("*.safetensors"))
    assert len(files) > 3 and files[0].name == f"diffusion_pytorch_model-00001-of-{len(files):05d}.safetensors"
    assert torch.equal(answer(alone(recipe, tmp_path / "many")), answer(alone(recipe, tmp_path / "one")))


def test_a_merge_that_cannot_be_whole_writes_nothing(tmp_path):
    base = write_base("pixel_flux", tmp_path / "base")
    recipe = recipe_for(tmp_path / "a", base)
    tensors = trained(recipe, tmp_path / "a.safetensors").tensors()
    first = next(iter(tensors))

    def refused(tensors: dict, match: str):
        save_file(tensors, tmp_path / "bad.safetensors")
        with pytest.raises(UserError, match=match):
            merge_adapter(recipe, tmp_path / "bad.safetensors", tmp_path / "out")
        assert not [p for p in tmp_path.iterdir() if p.name.startswith("out")]

    refused(tensors | {"lycoris_elsewhere.alpha": torch.ones(())}, r"bad\.safetensors.*lycoris_elsewhere")
    refused({n: t for n, t in tensors.items() if n != first}, "incomplete")
    refused(tensors | {first: torch.full_like(tensors[first], np.nan)}, "not finite")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="already exists"):
        merge_adapter(recipe, tmp_path / "a.safetensors", tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 60 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=60k", "tmpfs", str(place)]
    if os.geteuid() != 0 or not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_full_disk_leaves_nothing(small_disk, tmp_path):
    recipe = recipe_for(tmp_path / "a", write_base("pixel_flux", tmp_path / "base"))
    trained(recipe, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="No space left"):
        merge_adapter(recipe, tmp_path / "a.safetensors", small_disk / "out")
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize("how", [["--round", "nearest"], [], ["--dtype", "fp32"]], ids=["nearest", "stochastic", "fp32"])
def test_tool(how, tmp_path, capsys):
    """One line of what was kept and where rounding did most; the numbers of each layer in the folder; no share below zero."""
    recipe = recipe_for(tmp_path / "a", write_base("pixel_flux", tmp_path / "base"))
    trained(recipe, tmp_path / "a.safetensors", size=1e-3)
    arguments = [tmp_path / "a" / "recipe.toml", "--weights", tmp_path / "a.safetensors", "--out", tmp_path / "out", *how]
    before, sys.argv = sys.argv, ["merge_adapter", *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as done:
            runpy.run_path(str(TOOLS / "merge_adapter.py"), run_name="__main__")
    finally:
        sys.argv = before
    assert done.value.code == 0
    report, said = json.loads((tmp_path / "out" / "merge.json").read_text()), capsys.readouterr().out
    found = re.fullmatch(
        r"(\d+) layers: change kept ([\d.]+)%, worst layer (\S+): rounding error ([\d.]+)% of its change\n", said
    )
    assert found and int(found[1]) == len(report["layers"])
    assert float(found[2]) == pytest.approx(100 * report["total"]["kept"], abs=0.06)
    errors = {name: numbers["error"] for name, numbers in report["layers"].items()}
    assert errors[found[3]] == max(errors.values()) == pytest.approx(float(found[4]) / 100, abs=6e-4)
    assert (report["total"]["zeros"] > 0.3) == ("fp32" not in how) and (report["total"]["kept"] < 0.99) == ("nearest" in how)
    facts = json.loads((tmp_path / "out" / "dedistill.json").read_text())["merges"][0]
    assert facts["kept"] == report["total"]["kept"] and "lost" not in facts
