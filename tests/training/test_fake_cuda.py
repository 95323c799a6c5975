"""Real training on a card that has no numbers (tests/fake_cuda): where every tensor is, and what the host waits for."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from image_files import write_images
from ranks import forked
from tiny_recipes import ADAPTER, IMAGES

from dedistill.distributed.launcher import choose_kernels
from dedistill.models.flux.tiny import write_tiny_flux

STEPS = Path(__file__).parents[1] / "fake_cuda" / "steps.py"
LOKR = "adapter={kind='lokr', init='perturbed_normal', targets=[{preset='blocks', factor=2}]}"
CHECKPOINTED, ONE = "train.gradient_checkpointing=true", "train.micro_batch=1"
LOOKS = [
    "validate.every=1",
    "validate.samples=2",
    "meters.every=1",
    "meters.samples=2",
    "meters.steps=2",
    "preview.every=1",
    "preview.prompts=['the red sun']",
    "preview.cfgs=[1.0]",
    "sample.steps=1",
]
RUNS = {
    "lora, fp8 products, masked": [
        *(*LOOKS, "base.quant=fp8", "base.matmul=fp8", "snapshot.every=1", "snapshot.ema=[0.05, 0.1]"),
    ],
    "lokr, int8 products, checkpointed, offloaded, masked": [
        *(LOKR, "base.matmul=int8", CHECKPOINTED, "train.offload_activations=true", "train.optimizer=adamw_bf16"),
    ],
}
SOME = {"lokr, some checkpointed, plain base, alone": [LOKR, ONE, "train.gradient_checkpointing=2", "base.quant=none"]}
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the card without numbers is built by g++")


def on_card(recipe: Path, runs: dict[str, list[str]]) -> dict[str, dict]:
    """What steps.py found. In a process of its own: the card must be there before torch is."""
    paths = os.pathsep.join([str(STEPS.parents[2]), os.environ.get("PYTHONPATH", "")])
    words = [sys.executable, str(STEPS), str(recipe), json.dumps(runs)]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def find(tmp_path_factory):
    """What steps.py finds in runs of a tiny FLUX with these settings."""
    folder = tmp_path_factory.mktemp("card")
    write_tiny_flux(folder / "flux")
    for i, file in enumerate(sorted(write_images(folder / "photos", 6).glob("*.txt"))):
        file.write_text("a red cat" + i * " on the blue house")  # batches need a mask where lengths differ
    text = IMAGES.format(out=folder, base=folder / "flux", images=folder / "photos", cache=folder / "cache")
    (folder / "recipe.toml").write_text(text + "\n[base]\nquant = 'int8'\n")
    plain = ["train.precision=bf16", "train.micro_batch=2", "train.steps=1", "data.held_out=0.4"]

    def of(runs: dict[str, list[str]]) -> dict[str, dict]:
        placed = {name: [f"run.out={folder / name}", *plain, *settings] for name, settings in runs.items()}
        return on_card(folder / "recipe.toml", placed)

    return of


@pytest.fixture(scope="module")
def found(find):
    return find(RUNS)


@pytest.mark.parametrize("name", RUNS)
def test_everything_is_on_the_card(found, name):
    check_places(name, found[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SOME)
def test_everything_of_samples_alone_is_on_the_card(find, name):
    run = find(SOME)[name]
    check_places(name, run)
    check_waits(run)


def check_places(name: str, run: dict) -> None:
    """Of base, adapter, gradients and optimizer; an operation on two devices would have ended the run."""
    assert run["steps"] == 1
    assert set(run["tensors"]) == {f"{what} on cuda" for what in ("base", "adapter", "gradient", "optimizer")}
    assert run["tensors"]["gradient on cuda"] == run["tensors"]["adapter on cuda"]
    assert run["checkpointed"] == (2 if "some" in name else 3 if "checkpointed" in name else 0)
    assert ("masked" in run["attention"]) == ("alone" not in name)


@pytest.mark.parametrize("name", RUNS)
def test_a_step_waits_at_its_end_alone(found, name):
    """Once for all losses and the norm of the gradient, however many micro-batches; samples come while the card works."""
    check_waits(found[name])


def check_waits(run: dict) -> None:
    assert {place: n for place, n in run["waits"]["step"].items() if n} == {"training/trainer.py: _gradients": 1}
    assert set(run["copies"]["step"]) == {"not waited for"}


def test_inputs_of_blocks_wait_on_the_cpu(found):
    """Each is copied beside what computes, after what made it, and its memory is not given away before; what computes waits
    before it comes back."""
    log, away = (
        found["lokr, int8 products, checkpointed, offloaded, masked"]["streams"],
        ["copies waits for computing", "on copies", "kept for copies"],
    )
    back = "computing waits for copies"
    assert (count := log.count(back)) and [x for x in log if x != back] == away * count
    assert log[:3] == away and log[-1] == back
    assert not found["lora, fp8 products, masked"]["streams"]


def test_waits_of_all_else_are_known(found):
    """Per validation, preview, save: numbers that are shown or kept, never one for each layer."""
    run = found["lora, fp8 products, masked"]
    assert {phase: set(places) for phase, places in run["waits"].items() if phase != "step"} == {
        "start": {"training/engine.py: bit_sums"},
        "validation": {"evaluation/validation.py: __call__"},
        "meters": {"evaluation/validation.py: held_out_numbers", "evaluation/validation.py: _path"},
        "preview": {"sampling/sampler.py: <listcomp>", "models/model.py: decode"},
        "snapshot": {"training/optim.py: not_finite"},
        "checkpoint": {"training/optim.py: not_finite", "training/keeping.py: _copy"},
    }
    assert run["waits"]["checkpoint"]["training/keeping.py: _copy"] == 0, "copies of a save run beside training"
    assert run["files"] == {"checkpoint": ["cpu"], "image": ["cpu"], "snapshot": ["cuda"]}


def test_the_benchmark_is_on_the_card(found):
    assert set(found["benchmark"]) == {"cuda"}


@pytest.mark.slow
def test_flux_of_full_size(tmp_path):
    """Of 12 B: nothing that a small network hides."""
    recipe = tmp_path / "full.toml"
    text = ADAPTER.format(out=tmp_path, base="none").replace('path = "none"', "")
    recipe.write_text(text.replace("[validate]\nevery = 3\nsamples = 16\n", ""))
    sizes = "heads=24, head_dim=128, rope_axes=[16, 56, 56], text_dim=4096, pooled_dim=768"
    new = f"model.new={{height=8, width=16, patch=4, layers=19, single_layers=38, {sizes}}}"
    settings = [new, "train.steps=1", "train.batch=1", "train.precision=bf16", "train.optimizer=adamw_bf16", CHECKPOINTED]
    targets = "adapter.targets=[{preset='libreflux', factor=4}]"
    run = on_card(recipe, {"full": [*settings, targets]})["full"]
    assert run["parameters"] > 11.8e9 and run["checkpointed"] == 57
    assert set(run["tensors"]) == {f"{what} on cuda" for what in ("base", "adapter", "gradient", "optimizer")}
    assert run["waits"]["step"] == {"training/trainer.py: _gradients": 1}


def settled(card: bool, exact: bool, own: dict[str, str]) -> list[object]:
    """What :func:`choose_kernels` leaves behind where only ``own`` of its variables are set."""
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG"):
        os.environ.pop(name, None)
    os.environ.update(own)
    torch.cuda.is_available = lambda: card
    torch.backends.cuda.enable_cudnn_sdp(True)
    choose_kernels(exact=exact)
    memory, workspace = os.environ.get("PYTORCH_CUDA_ALLOC_CONF"), os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    return [memory, torch.backends.cuda.cudnn_sdp_enabled(), torch.are_deterministic_algorithms_enabled(), workspace]


@pytest.mark.parametrize(
    ("card", "exact", "own", "wanted"),
    [
        (True, True, {}, ["expandable_segments:True", False, True, ":4096:8"]),
        (True, False, {}, ["expandable_segments:True", False, False, None]),
        (False, True, {}, ["expandable_segments:True", False, False, None]),
        (False, False, {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, ["max_split_size_mb:64", False, False, None]),
        (False, False, {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, [None, False, False, None]),
    ],
)
def test_what_is_settled_before_a_card_is_used(card, exact, own, wanted):
    """Deterministic kernels where a card is and bits are promised; torch's memory as the user says, if they say it."""
    assert forked(settled, card, exact, own) == wanted
