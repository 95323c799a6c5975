"""Whole runs with blocks that wait in the memory of the CPU: the same files as without."""

import json

import pytest
import torch
from test_previews import PREVIEW
from test_run import _stop_after, run, same, weights
from test_world import train
from test_zero import zero
from tiny_recipes import ADAPTER

from dedistill.errors import UserError
from dedistill.models import blocks, swap
from dedistill.models.flux.tiny import write_tiny_flux
from dedistill.models.swap import saved
from dedistill.recipe import load_recipe
from dedistill.runs.model import open_finished
from dedistill.sampling.sampler import Sampling, sample, start_noise
from dedistill.train import main
from dedistill.training.engine import Engine
from dedistill.training.fsdp import Fsdp2
from dedistill.training.zero import Zero2, Zero3

CHECKPOINTED = "train.gradient_checkpointing=true"


@pytest.fixture
def six_blocks(image_recipe, tiny_flux, tmp_path):
    """A recipe on a FLUX of two and four blocks, with validation and previews."""
    write_tiny_flux(tmp_path / "flux", layers=2, single_layers=4)
    text = image_recipe.read_text().replace(str(tiny_flux), str(tmp_path / "flux"))
    image_recipe.write_text(text + "\n[base]\nquant = 'int8'\n[validate]\nevery = 1\nsamples = 2\n")
    return image_recipe


@pytest.mark.slow
def test_a_run_that_is_stopped_and_goes_on_is_that_of_a_whole_base(six_blocks, tmp_path, monkeypatch):
    """Validated and previewed at every step; it goes on with more blocks, and their number is no reason to refuse."""
    settings = [*PREVIEW, "preview.every=1", "train.steps=3", "validate.every=1", "train.micro_batch=2"]
    plain = run(six_blocks, tmp_path / "plain", *settings)
    _stop_after(monkeypatch, 2)
    words = [w for s in (*settings, CHECKPOINTED, "base.swap=3", f"run.out={tmp_path / 'swapped'}") for w in ("--set", s)]
    assert main([str(six_blocks), *words]) == 75
    monkeypatch.undo()
    swapped = run(six_blocks, tmp_path / "swapped", *settings, CHECKPOINTED, "base.swap=6")
    assert same(weights(plain), weights(swapped))
    assert (plain / "metrics.jsonl").read_bytes() == (swapped / "metrics.jsonl").read_bytes()
    images = sorted(p.relative_to(plain) for p in plain.glob("previews/*/*.png"))
    assert len(images) == 16 and all((plain / p).read_bytes() == (swapped / p).read_bytes() for p in images)
    effects = json.loads((swapped / "plan.json").read_text())["effects"]
    assert effects["swap"]["blocks"] == effects["gradient_checkpointing"] == 6
    made = [images_of(six_blocks, out, *more) for out, more in ((plain, ()), (swapped, (CHECKPOINTED, "base.swap=5")))]
    assert torch.equal(*made) and made[0].isfinite().all()
    assert 0 < effects["swap"]["device_bytes"] < effects["swap"]["host_bytes"] < effects["storage_bytes"]


def test_on_a_cpu_auto_means_off(six_blocks, tmp_path):
    plain = run(six_blocks, tmp_path / "plain")
    auto = run(six_blocks, tmp_path / "auto", "train.gradient_checkpointing=auto", "base.swap=auto")
    assert same(weights(plain), weights(auto))
    effects = json.loads((auto / "plan.json").read_text())["effects"]
    assert effects["gradient_checkpointing"] == 0 and "swap" not in effects
    assert effects["auto"] == {"train.gradient_checkpointing": False, "base.swap": 0}


def test_where_images_are_made_as_few_blocks_wait_as_must(six_blocks, tmp_path, monkeypatch):
    """Of a device that has room for the base and SPARE, or for less and less of the base."""
    out, auto = run(six_blocks, tmp_path / "run"), "base.swap=auto"
    truth = images_of(six_blocks, out)
    whole = open_finished(load_recipe(six_blocks, [f"run.out={out}"]))
    sizes = [sum(p.nbytes for p in b.parameters()) for b in whole.family.blocks(whole.components.denoiser)]
    for waiting in (0, 5, 6):
        free = blocks.SPARE + sum(sizes) - saved(sizes, waiting)
        monkeypatch.setattr(swap, "free_memory", lambda device, free=free: free)
        found = open_finished(load_recipe(six_blocks, [f"run.out={out}", auto, "train.gradient_checkpointing=auto"]))
        assert found.facts.get("swap", {"blocks": 0})["blocks"] == waiting
        assert torch.equal(images_of(six_blocks, out, auto, "train.gradient_checkpointing=auto"), truth)


def images_of(recipe, out, *settings):
    """By the finished run, as sweeps and evaluation open it."""
    finished = open_finished(load_recipe(recipe, [f"run.out={out}", *settings]))
    return sample(finished, ["the red sun"], start_noise(0, 1, finished.components.sample_shape), Sampling(steps=2))


NEW = "model.new={height=8, width=16, patch=4, layers=2, single_layers=3, heads=2, head_dim=16, rope_axes=[4, 6, 6]}"


@pytest.mark.parametrize("kind", ["lokr", pytest.param("lora", marks=pytest.mark.slow)])
def test_two_processes(tmp_path, kind):
    recipe = tmp_path / "recipe.toml"
    text = ADAPTER.format(out=tmp_path, base="none").replace('path = "none"', "")
    size = "factor = 4" if kind == "lokr" else "rank = 2"
    text = text.replace('kind = "lokr"\ninit = "perturbed_normal"', f"kind = '{kind}'").replace("factor = 4", size)
    recipe.write_text(text)
    settings = (NEW, "train.steps=3", "train.micro_batch=2")
    plain = train(2, recipe, tmp_path / "plain", *settings)
    swapped = train(2, recipe, tmp_path / "swapped", *settings, CHECKPOINTED, "base.swap=4")
    assert same(weights(plain), weights(swapped))
    assert (plain / "metrics.jsonl").read_bytes() == (swapped / "metrics.jsonl").read_bytes()


@pytest.mark.slow
def test_zero2_whose_base_is_whole(adapter_recipe, tmp_path):
    recipe = tmp_path / "new.toml"
    recipe.write_text("".join(line for line in adapter_recipe.read_text().splitlines(True) if not line.startswith("path")))
    plain, swapped = (
        zero(2, 2, recipe, tmp_path / name, NEW, "train.steps=2", *more)
        for name, more in (("plain", ()), ("swapped", (CHECKPOINTED, "base.swap=4")))
    )
    assert same(weights(plain), weights(swapped))


REFUSED = [
    (["base.swap=3"], "needs train.gradient_checkpointing = true"),
    (["base.swap=3", "train.gradient_checkpointing=2"], "needs train.gradient_checkpointing = true"),
    (["base.swap=2", CHECKPOINTED], "2 saves nothing"),
    (["base.swap=3", CHECKPOINTED, "base.quant=int8-quanto"], "'int8' has the same codes"),
    (["base.swap=auto"], 'needs train.gradient_checkpointing = true or "auto"'),
    (["base.swap=auto", CHECKPOINTED, "base.quant=int8-quanto"], "'int8' has the same codes"),
]


@pytest.mark.parametrize(("settings", "why"), REFUSED)
def test_what_cannot_work_is_refused(adapter_recipe, settings, why):
    with pytest.raises(UserError, match=rf"base\.swap: .*{why}"):
        load_recipe(adapter_recipe, settings)


def test_a_whole_network_cannot_wait(teacher_recipe):
    with pytest.raises(UserError, match=r"base\.swap: .*is frozen"):
        load_recipe(teacher_recipe, ["base.swap=3", CHECKPOINTED])


@pytest.mark.parametrize(("engine", "works"), [(Engine, True), (Fsdp2, False), (Zero2, True), (Zero3, False)])
def test_engines_that_cut_blocks_refuse(adapter_recipe, engine, works):
    from dedistill.distributed.world import World

    made = engine(load_recipe(adapter_recipe, ["base.swap=3", CHECKPOINTED]), World())
    if works:
        return made.check()
    with pytest.raises(UserError, match=r"base\.swap: .*a part of every block"):
        made.check()


@pytest.mark.parametrize("setting", ["base.swap=3", "train.gradient_checkpointing=3"])
def test_more_blocks_than_there_are(adapter_recipe, tmp_path, setting, capsys):
    more = [CHECKPOINTED] if "swap" in setting else []
    words = [w for s in (*more, setting) for w in ("--set", s)]
    assert main([str(adapter_recipe), *words]) == 2
    assert f"{setting.partition('=')[0]}: 3 blocks, and the network has 2" in capsys.readouterr().err
