"""DeepSpeed ZeRO gives what one process gives, from parts (docs/engines.md)."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import deepspeed
import deepspeed.runtime.zero.muon.original_muon
import deepspeed.runtime.zero.stage3  # noqa: F401 - these here, so that forked processes need not import them
import pytest
import torch
from ranks import run_launched, run_ranks
from safetensors.torch import load_file
from test_launch import ENVIRONMENT, ROOT
from test_world import BF16, LORA, arguments, furthest, same, saved, train

from dedistill.data.digits import load_digits
from dedistill.distributed.launcher import engine_asked
from dedistill.distributed.world import World
from dedistill.errors import RUN_AGAIN, UserError
from dedistill.objectives.base import Objective
from dedistill.recipe import load_recipe
from dedistill.runs.checkpoint import list_checkpoints
from dedistill.train import main
from dedistill.training.trainer import Trainer
from dedistill.training.zero import Zero, Zero2, Zero3

NOTHING_KEPT = ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance", "prefetch_bucket_size")
SMALL = {2: {"reduce_bucket_size": 1000}, 3: {"reduce_bucket_size": 1000} | {f"stage3_{key}": 0 for key in NOTHING_KEPT}}
"""Gradients of a tiny adapter travel in several pieces; ZeRO-3 cuts every tensor, and keeps none longer than it is used."""
TOLERANCE = 1e-5
BRIEF = ("validate.every=3", "validate.samples=2", "snapshot.every=0", "checkpoint.every=0", "train.steps=3")


def slow(*values: object):
    """A parameter of tests that only ``-m slow`` runs."""
    return pytest.param(*values, marks=pytest.mark.slow)


def _launched(stage: int, folder: Path, given: list[str], work) -> int:
    """``work`` as ``accelerate launch`` starts it under ZeRO."""
    file = folder / f"zero{stage}.{os.environ['RANK']}.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": stage, **SMALL[stage]}}))
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}
    return work(given)


def zero(stage: int, size: int, recipe: Path, out: Path, *settings: str, work=main) -> Path:
    """A run under ZeRO on ``size`` processes that ends well."""
    said = out.parent / f"said-{out.name}"
    codes = run_ranks(size, _launched, stage, out.parent, arguments(recipe, out, *settings), work, said=said)
    assert codes == [0] * size, [(said / str(r)).read_text()[-2500:] for r in range(size)]
    return out


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def _noting(given: list[str]) -> int:
    """``main``, noting what each process held at its end, and at most of the base while it was used."""
    original, peak = Trainer.fit, [0]

    def fit(self, *arguments):
        denoiser = self.model.components.denoiser
        held = [*denoiser.parameters()]
        live = lambda: sum(p.nbytes for p in held)  # noqa: E731
        for module in denoiser.modules():
            module.register_forward_pre_hook(lambda *_: peak.append(max(peak.pop(), live())))
        yield from original(self, *arguments)
        state = self.engine.optimizer.state.values()
        components = [p.ds_tensor if hasattr(p, "ds_tensor") else p for p in denoiser.parameters()]
        note = {
            "moments": sum(s["exp_avg"].numel() for s in state),
            "base": sum(t.nbytes for t in components),
            "whole": self.model.facts["storage_bytes"],
            "int8": sum(t.nbytes for t in components if t.dtype == torch.int8) / sum(t.nbytes for t in components),
            "trained": self.model.facts["trained_parameters"],
            "live": live(),
            "peak": peak[0],
        }
        (self.run.path / f"held.{self.world.rank}").write_text(json.dumps(note))

    Trainer.fit = fit
    return main(given)


@pytest.mark.parametrize("stage", [2, slow(3)])
def test_from_two_processes_to_one_to_three(adapter_recipe, tmp_path, stage):
    """ZeRO on 2, plain on 1, ZeRO on 3, by resume, against one process: questions and learning rates to the
    bit, weights and moments to TOLERANCE; each process held its share alone, int8 as int8."""
    # some steps are clipped, some are not; four micro-batches are two each on two processes, and two, one and one on three
    settings = ("log.every=1", "validate.every=6", "validate.samples=2", "snapshot.every=0")
    settings += ("train.max_grad_norm=0.2", "train.micro_batch=2")
    alone = train(1, adapter_recipe, tmp_path / "alone", *settings)
    out = zero(stage, 2, adapter_recipe, tmp_path / "chain", *settings, "train.steps=2", work=_noting)
    two = [json.loads((out / f"held.{r}").read_text()) for r in range(2)]
    train(1, adapter_recipe, out, *settings, "train.steps=4")
    zero(stage, 3, adapter_recipe, out, *settings, "train.steps=6", work=_noting)
    three = [json.loads((out / f"held.{r}").read_text()) for r in range(3)]
    norms = [row["grad_norm"] for row in rows(alone)]
    assert min(norms) < 0.2 < max(norms)
    for a, b in zip(rows(alone), rows(out), strict=True):
        assert (a["step"], a["lr"], a["sigma_mean"]) == (b["step"], b["lr"], b["sigma_mean"])
        assert abs(a["loss"] - b["loss"]) < TOLERANCE and abs(a["grad_norm"] - b["grad_norm"]) < 1e-4
    assert furthest(saved(alone), saved(out)) < TOLERANCE
    assert furthest(saved(alone, "optimizer"), saved(out, "optimizer")) < TOLERANCE
    counts = {float(t) for name, t in saved(out, "optimizer").items() if name.endswith("/step")}
    assert counts == {6.0}
    for held in (two, three):
        size = len(held)
        for one in held:
            assert one["trained"] / size <= one["moments"] <= one["trained"] / size + 200
            assert one["base"] < one["whole"] / size * 1.05 if stage == 3 else one["base"] == one["whole"]
            assert one["live"] == (0 if stage == 3 else one["whole"]) and one["int8"] > 0.5
            assert 0 < one["peak"] < one["whole"] / 4 if stage == 3 else one["peak"] == one["whole"]


@pytest.mark.parametrize(("stage", "fault"), [slow(2, "gradient"), (3, "gradient"), (2, "norm"), slow(3, "norm")])
def test_a_step_that_is_not_finite_changes_nothing(adapter_recipe, tmp_path, stage, fault):
    """NaN in the gradient of one process, or a step that the guard refuses: weights, moments and counts keep every
    bit on all processes, and the next step goes on."""
    settings = (*BRIEF, "checkpoint.every=1", "checkpoint.keep=9")
    out = zero(stage, 2, adapter_recipe, tmp_path / "r", *settings, work=FAULTS[fault])
    assert [r["applied"] for r in rows(out)] == [True, False, True]
    for group in ("trainable", "optimizer"):
        first, second, third = (load_file(c / f"{group}.safetensors") for c in list_checkpoints(out / "checkpoints"))
        assert same(first, second) and not same(second, third)


@pytest.mark.parametrize("stage", [2, slow(3)])
def test_a_spoilt_optimizer_stops_all(adapter_recipe, tmp_path, stage):
    """NaN in a moment that one process holds; nothing of it is saved."""
    given = arguments(adapter_recipe, tmp_path / "r", *BRIEF, "checkpoint.every=1")
    assert run_ranks(2, _launched, stage, tmp_path, given, _bad_moment, said=tmp_path / "said") == [1, 1]
    for rank in (0, 1):
        assert "after step 1 1 tensor is not finite" in (tmp_path / f"said/{rank}").read_text()
    assert not list_checkpoints(tmp_path / "r" / "checkpoints")


def _bad_moment(given: list[str]) -> int:
    original = Zero.apply

    def apply(self, lr):
        original(self, lr)
        if self.world.rank == 1:
            next(iter(self.optimizer.state.values()))["exp_avg"][0] = math.nan

    Zero.apply = apply
    return main(given)


def _bad_gradient(given: list[str]) -> int:
    original = Zero._gradients

    def gradients(self):
        parts = original(self)
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == 2 and self.world.rank == 1:
            parts[0].view(-1)[0] = math.nan
        return parts

    Zero._gradients = gradients
    return main(given)


def _bad_norm(given: list[str]) -> int:
    original = Zero.finish

    def finish(self):
        norm = original(self)
        self.calls = getattr(self, "calls", 0) + 1
        return torch.tensor(math.inf) if self.calls == 2 else norm

    Zero.finish = finish
    return main(given)


FAULTS = {"gradient": _bad_gradient, "norm": _bad_norm}


KINDS = [
    (2, "adapter", ["base.quant=int8-quanto", LORA]),
    slow(2, "adapter", ["base.quant=none", "train.gradient_checkpointing=true"]),
    slow(2, "teacher", []),
    slow(3, "adapter", ["base.quant=none", LORA, "train.gradient_checkpointing=true"]),
    (3, "adapter", ["train.gradient_checkpointing=true", "snapshot.every=1"]),
    (3, "teacher", []),
]


@pytest.mark.parametrize(("stage", "which", "settings"), KINDS)
def test_every_kind_of_base_and_adapter(request, tmp_path, stage, which, settings):
    """docs/engines.md: the cells of the table that say ok."""
    recipe, settings = request.getfixturevalue(f"{which}_recipe"), [*settings, "train.steps=2"]
    alone = train(1, recipe, tmp_path / "alone", *settings)
    both = zero(stage, 2, recipe, tmp_path / "both", *settings)
    assert furthest(saved(alone), saved(both)) < TOLERANCE
    for folder in ("model", "snapshots"):
        files = [sorted((run / folder).rglob("*.safetensors")) for run in (alone, both)]
        assert [len(found) for found in files] == [int(which == "teacher") * (folder == "model") or len(files[0])] * 2
        for a, b in zip(*files, strict=True):
            assert furthest(load_file(a), load_file(b)) < TOLERANCE


@pytest.mark.parametrize("stage", [slow(2), 3])
def test_bf16_is_the_callers(adapter_recipe, tmp_path, stage):
    """DeepSpeed turns autocast off in its engine. Against DDP, where the micro-batches are the same: the first loss is equal to
    the bit. ZeRO-3 adds up gradients of activations in another order, which rounds bf16 in another way."""
    settings = (*BRIEF, "train.precision=bf16", "train.steps=1")
    ddp = rows(train(2, adapter_recipe, tmp_path / "ddp", *settings))[0]
    out = rows(zero(stage, 2, adapter_recipe, tmp_path / "zero", *settings))[0]
    fp32 = rows(train(1, adapter_recipe, tmp_path / "fp32", *settings, "train.precision=fp32"))[0]
    assert out["loss"] == ddp["loss"] != fp32["loss"]
    assert out["grad_norm"] == pytest.approx(ddp["grad_norm"], rel=1e-6 if stage == 2 else 4e-3)


def _dying(given: list[str]) -> int:
    original = Zero.finish

    def finish(self):
        norm = original(self)
        if self.world.rank == 1:
            os._exit(5)
        return norm

    Zero.finish = finish
    return main(given)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_a_process_that_dies_ends_the_others(adapter_recipe, tmp_path, stage):
    given = arguments(adapter_recipe, tmp_path / "r", *BRIEF)
    assert run_ranks(3, _launched, stage, tmp_path, given, _dying, said=tmp_path / "said") == [RUN_AGAIN, 5, RUN_AGAIN]
    for rank in (0, 2):
        assert f"rank {rank}: error: another process of this run has ended" in (tmp_path / f"said/{rank}").read_text()


@pytest.mark.slow
def test_images_while_training(image_recipe, tmp_path):
    """All processes make them together, where the network is in parts; rank 0 writes."""
    images = ("preview.every=1", "preview.prompts=['a dog']", "preview.cfgs=[1.0, 2.0]", "train.steps=1")
    out = zero(3, 2, image_recipe, tmp_path / "r", *images)
    assert len(list((out / "previews").rglob("p*.png"))) == 4 and rows(out)[0]["applied"]


@pytest.mark.slow
def test_one_process_alone_sees_an_image_of_a_new_size(image_recipe, tmp_path):
    """Of several sizes, each of which comes to one process before the other; a step of theirs is that of one process."""
    sizes = ("data.resolutions=[64, 96]", "train.micro_batch=1", "train.steps=3", "validate.every=0", "run.seed=1")
    alone = train(1, image_recipe, tmp_path / "alone", *sizes)
    both = zero(3, 2, image_recipe, tmp_path / "both", *sizes)
    assert furthest(saved(alone), saved(both)) < TOLERANCE


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"stage": 1}, "zero_optimization.stage is 1"),
        ({"stage": 3, "offload_param": {"device": "cpu"}}, "zero_optimization.offload_param is refused"),
        ({"stage": 2, "reduce_bucket_size": "auto"}, "zero_optimization.reduce_bucket_size is 'auto'"),
        ({"stage": 2, "reduce_bucket_size": -1}, "zero_optimization.reduce_bucket_size is -1"),
    ],
)
def test_settings_of_sharding_are_checked(tmp_path, monkeypatch, table, said):
    with pytest.raises(UserError, match=said):
        asked(monkeypatch, tmp_path, json.dumps({"zero_optimization": table}))


@pytest.mark.parametrize("key", ["fp16", "bf16", "optimizer", "scheduler", "train_batch_size", "gradient_clipping", "wandb"])
def test_what_the_recipe_decides_is_refused(tmp_path, monkeypatch, key):
    with pytest.raises(UserError, match=f"{key} is refused: the recipe decides"):
        asked(monkeypatch, tmp_path, json.dumps({"zero_optimization": {"stage": 2}, key: 1}))


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "is no JSON"), ("[]", "no table zero_optimization"), ("{}", "no table zero_optimization"), (None, "cannot be read")],
)
def test_a_file_that_is_none_is_refused(tmp_path, monkeypatch, text, said):
    with pytest.raises(UserError, match=said):
        asked(monkeypatch, tmp_path, text)


def asked(monkeypatch, folder: Path, text: str | None) -> str:
    if text is not None:
        (folder / "zero.json").write_text(text)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(folder / "zero.json"))
    return engine_asked()


def test_without_a_file_zero_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.delenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", raising=False)
    with pytest.raises(UserError, match=r"without a deepspeed_config_file: use launch/zero2.yaml"):
        engine_asked()


@pytest.mark.parametrize("stage", [2, 3])
def test_our_own_files_are_taken(monkeypatch, stage):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(ROOT / f"launch/zero{stage}.json"))
    assert engine_asked() == f"zero{stage}"


def test_one_process_has_nobody_to_share_with(adapter_recipe, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(ROOT / "launch/zero2.json"))
    assert main([str(adapter_recipe)]) == 2
    assert "one process alone has nobody to share the work of zero2 with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "engine", "said"),
    [
        (["train.exact=true"], Zero2, r"train.exact: DeepSpeed .zero2. sums gradients as floats"),
        (["train.exact=true"], Zero3, r"train.exact: DeepSpeed .zero3. sums gradients as floats"),
        (BF16, Zero2, r"train.optimizer: DeepSpeed .zero2. steps float32 copies"),
        (["snapshot.every=1", "snapshot.ema=[0.05, 0.1]"], Zero3, r"snapshot.ema: ZeRO-3 leaves no process whole weights"),
        (["base.quant=int8-quanto"], Zero3, r"base.quant: 'int8-quanto' breaks"),
    ],
)
def test_recipes_that_zero_cannot_train(adapter_recipe, setting, engine, said):
    with pytest.raises(UserError, match=said):
        engine(load_recipe(adapter_recipe, list(setting)), World()).check()


@pytest.mark.slow
def test_deepspeed_is_imported_only_when_asked_for(adapter_recipe):
    """It takes seconds, and prints."""
    code = "import sys; from dedistill.train import main; assert not main(sys.argv[1:]); sys.exit('deepspeed' in sys.modules)"
    command = [sys.executable, "-c", code, str(adapter_recipe), "--set", "train.steps=1"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-800:]


@pytest.mark.parametrize("stage", [slow(2), 3])
def test_the_files_of_launch(adapter_recipe, tmp_path, stage):
    """What ``accelerate launch`` makes of them is that engine, on two processes, which says what it is."""
    given, said = arguments(adapter_recipe, tmp_path / "r", *BRIEF), tmp_path / "said"
    assert run_launched(f"zero{stage}.yaml", main, given, said=said) == 0, (said / "0").read_text()
    assert_launched(stage, tmp_path / "r", (said / "0").read_text())


def assert_launched(stage: int, out: Path, said: str) -> None:
    effects = json.loads((out / "plan.json").read_text())["effects"]
    assert (effects["engine"], effects["processes"]) == (f"zero{stage}", 2)
    assert f"in parts (ZeRO-{stage})" in said and "DeepSpeed" not in said


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_a_real_launch(adapter_recipe, tmp_path, stage):
    options = ["--config_file", f"launch/zero{stage}.yaml", "--num_processes", "2", "--num_cpu_threads_per_process", "1"]
    command = [
        "accelerate",
        "launch",
        *options,
        "-m",
        "dedistill.train",
        str(adapter_recipe),
        "--set",
        "train.steps=2",
        "--cpu",
    ]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert_launched(stage, tmp_path / "dedistill", done.stderr)


def _spoilt(given: list[str]) -> int:
    """``main``, where the first sample of steps 3, 4 and 5 is not finite wherever it is drawn."""
    real, bad = Objective.noisy_batch, {load_digits(0.2).slots(0, step, 8)[0].name for step in (2, 3, 4)}

    def task(self, step, positions):
        found = real(self, step, positions)
        target = found.target.clone()
        target[[name in bad for name in found.names]] = torch.nan
        return replace(found, target=target)

    Objective.noisy_batch = task
    return main(given)


@pytest.mark.parametrize("stage", [2, slow(3)])
def test_a_run_goes_back_in_process(adapter_recipe, tmp_path, stage):
    """With the checkpoint's weights and moments in DeepSpeed's parts, as one process does."""
    settings = ("validate.every=99", "validate.samples=2", "snapshot.every=0", "checkpoint.every=2", "train.steps=6")
    said = tmp_path / "said"
    assert run_ranks(1, _spoilt, arguments(adapter_recipe, tmp_path / "alone", *settings), said=said) == [0]
    alone, both = tmp_path / "alone", zero(stage, 2, adapter_recipe, tmp_path / "both", *settings, work=_spoilt)
    assert rows(alone)[2]["quarantined"] == rows(both)[2]["quarantined"]
    assert [r["applied"] for r in rows(both)] == [True] * 6
    assert furthest(saved(alone), saved(both)) < TOLERANCE
    assert furthest(saved(alone, "optimizer"), saved(both, "optimizer")) < TOLERANCE
