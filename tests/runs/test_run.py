"""Whole runs: reproducible, resumable bit for bit, invariant to micro-batches."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny_recipes import ADAPTER

from dedistill.runs.checkpoint import list_checkpoints, read_checkpoint, save_checkpoint
from dedistill.train import main
from dedistill.training import keeping


def run(recipe: Path, out: Path, *settings: str) -> Path:
    arguments = [str(recipe), "--debug", "--set", f"run.out={out}"]
    assert main(arguments + [a for s in settings for a in ("--set", s)]) == 0
    return out


def weights(run_folder: Path) -> dict[str, torch.Tensor]:
    return load_file(list_checkpoints(run_folder / "checkpoints")[-1] / "trainable.safetensors")


def metrics(run_folder: Path) -> list[dict]:
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def plain(tmp_path_factory, base_model):
    """Finished runs of the recipe by their settings, each trained once; nobody may change them."""
    folder, found = tmp_path_factory.mktemp("plain"), {}
    (folder / "recipe.toml").write_text(ADAPTER.format(out=folder, base=base_model))

    def made(*settings: str) -> Path:
        if settings not in found:
            found[settings] = run(folder / "recipe.toml", folder / str(len(found)), *settings)
        return found[settings]

    return made


def test_two_runs_give_the_same_bytes(plain, adapter_recipe, tmp_path):
    a, b = plain(), run(adapter_recipe, tmp_path / "b")
    assert (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()
    assert same(weights(a), weights(b))
    c = run(adapter_recipe, tmp_path / "c", "run.seed=1")
    assert (a / "metrics.jsonl").read_bytes() != (c / "metrics.jsonl").read_bytes()


def test_metrics_rows_are_complete(plain, adapter_recipe, tmp_path):
    rows = metrics(plain())
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6]
    assert all({"loss", "lr", "grad_norm", "sigma_loss"} <= r.keys() and r["applied"] for r in rows)
    assert [r["step"] for r in rows if "val_loss" in r] == [3, 6] and all(r["val_loss_se"] > 0 for r in rows if "val_loss" in r)
    assert rows[0]["val_loss_start"] > 0
    # validation has its own draws: without it, training is the same
    silent = run(adapter_recipe, tmp_path / "b", "validate.every=100")
    assert same(weights(plain()), weights(silent))


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_bf16"])
@pytest.mark.parametrize("stop", [2, 4])
def test_resumed_equals_uninterrupted_and_differs_from_weights_only(
    plain, adapter_recipe, tmp_path, stop, optimizer, monkeypatch
):
    """Three runs: A uninterrupted, B stopped and continued, C with the optimizer lost."""
    precision = ["train.precision=bf16"] if optimizer == "adamw_bf16" else []
    settings = [f"train.optimizer={optimizer}", *precision]
    a, b, c = plain(*settings), tmp_path / "b", tmp_path / "c"
    _stop_after(monkeypatch, stop)
    code = main([str(adapter_recipe), "--set", f"run.out={b}", *[x for s in settings for x in ("--set", s)]])
    assert code == 75
    monkeypatch.undo()
    shutil.copytree(b, c)
    _forget_optimizer(c)
    run(adapter_recipe, b, *settings)
    run(adapter_recipe, c, *settings)
    assert (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()
    for name in ("trainable", "optimizer"):
        left, right = (load_file(list_checkpoints(f / "checkpoints")[-1] / f"{name}.safetensors") for f in (a, b))
        assert same(left, right)
    assert sorted(p.name for p in (a / "snapshots").iterdir()) == sorted(p.name for p in (b / "snapshots").iterdir())
    assert not same(weights(a), weights(c)), "the oracle must notice a lost optimizer"


def _stop_after(monkeypatch, step: int) -> None:
    """Ask for a stop, as Ctrl-C does, once ``step`` steps are done."""
    from dedistill.training.trainer import Trainer

    original = Trainer.train_step

    def with_signal(self, index, tasks):
        if index + 1 == step:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGINT)
        return original(self, index, tasks)

    monkeypatch.setattr(Trainer, "train_step", with_signal)


def _forget_optimizer(folder: Path) -> None:
    """A well-formed checkpoint that holds weights and step only."""
    checkpoint = list_checkpoints(folder / "checkpoints")[-1]
    groups, manifest = read_checkpoint(checkpoint)
    shutil.rmtree(checkpoint)
    facts = {key: manifest[key] for key in ("skipped", "guard", "unfinished")}
    save_checkpoint(checkpoint.parent, manifest["step"], {"trainable": groups["trainable"]}, facts, keep=2)


def test_micro_batches_change_nothing_but_rounding(adapter_recipe, tmp_path):
    """32 x 1 and 8 x 4 see the same samples, noise and sigmas."""
    big = run(adapter_recipe, tmp_path / "big", "train.batch=32", "train.lr=1e-3")
    small = run(adapter_recipe, tmp_path / "small", "train.batch=32", "train.lr=1e-3", "train.micro_batch=8")
    a, b = weights(big), weights(small)
    assert max(float((a[k] - b[k]).abs().max()) for k in a) < 1e-5
    rows = [metrics(f) for f in (big, small)]
    assert [r["sigma_mean"] for r in rows[0]] == [r["sigma_mean"] for r in rows[1]]
    assert all(abs(x["loss"] - y["loss"]) < 1e-5 for x, y in zip(*rows))


def test_gradient_checkpointing_gives_the_same_weights(plain, adapter_recipe, tmp_path):
    a = plain()
    b = run(adapter_recipe, tmp_path / "b", "train.gradient_checkpointing=true")
    assert max(float((weights(a)[k] - weights(b)[k]).abs().max()) for k in weights(a)) < 1e-6


def test_training_helps(base_model, adapter_recipe, tmp_path):
    """Forty steps of a tiny adapter lower the held-out loss by more than its error."""
    out = run(adapter_recipe, tmp_path / "a", "train.steps=40", "validate.every=40", "validate.samples=256", "train.batch=32")
    rows = metrics(out)
    gain = rows[0]["val_loss_start"] - rows[-1]["val_loss"]
    assert gain > 5 * rows[-1]["val_loss_se"]


def test_finished_run_is_left_as_it_is(adapter_recipe, tmp_path, capsys):
    out = run(adapter_recipe, tmp_path / "a")
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name not in ("plan.json",)}
    run(adapter_recipe, out)
    assert "already finished" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in before} == before


@pytest.mark.parametrize("settings", [[], ["snapshot.every=0"], ["snapshot.ema=[0.1, 0.2]"]])
def test_without_room_for_the_next_save_no_step_is_made(adapter_recipe, tmp_path, monkeypatch, capsys, settings):
    """Neither of a new run nor of one that goes on; what has room is what a save has written."""
    out = tmp_path / "a"
    words = [str(adapter_recipe), *(w for s in [f"run.out={out}", *settings] for w in ("--set", s))]
    room = SimpleNamespace(free=0)
    monkeypatch.setattr(keeping, "disk_usage", lambda path: room)
    assert main(words) == 1 and not (out / "metrics.jsonl").exists()
    room.free = 10**9
    run(adapter_recipe, out, *settings)
    before = {p: p.read_bytes() for p in out.rglob("step-*/*.safetensors")}
    saved = [list_checkpoints(out / "checkpoints")[-1], *out.glob("snapshots/**/step-00000006.safetensors")]
    whole = sum(p.stat().st_size for place in saved for p in [place, *place.glob("*")] if p.is_file())
    words += ["--set", "train.steps=8"]
    room.free = int(0.6 * whole)
    capsys.readouterr()
    assert main(words) == 1 and "run.out: " in (said := capsys.readouterr().err) and "Make room" in said
    assert {p: p.read_bytes() for p in out.rglob("step-*/*.safetensors")} == before
    room.free = whole
    assert main(words) == 0


def test_two_checkpoints_and_all_snapshots_are_kept(plain):
    out = plain()
    assert [p.name for p in list_checkpoints(out / "checkpoints")] == ["step-00000004", "step-00000006"]
    assert sorted(p.name for p in (out / "snapshots").iterdir()) == [f"step-{s:08d}.safetensors" for s in (2, 4, 6)]


def test_constant_run_can_be_made_longer_but_a_decay_cannot(plain, adapter_recipe, tmp_path, capsys):
    long, short = plain("train.steps=8"), shutil.copytree(plain(), tmp_path / "short")
    run(adapter_recipe, short, "train.steps=8")
    assert same(weights(long), weights(short))
    cosine = ["--set", f"run.out={tmp_path / 'cos'}", "--set", "train.schedule=cosine"]
    assert main([str(adapter_recipe), *cosine]) == 0
    assert main([str(adapter_recipe), *cosine, "--set", "train.steps=8"]) == 1
    assert "train.steps: 6 there, 8 here" in capsys.readouterr().err


def test_what_is_only_written_may_change_on_the_way(plain, adapter_recipe, tmp_path):
    a, b = plain("train.steps=8"), shutil.copytree(plain(), tmp_path / "b")
    run(adapter_recipe, b, "train.steps=8", "log.sigma_bins=3", "validate.every=8", "snapshot.every=1", "checkpoint.every=1")
    assert same(weights(a), weights(b))
    assert len(metrics(b)[-1]["sigma_loss"]) == 3


def test_a_run_of_an_earlier_arithmetic_says_that_it_goes_on_with_another(adapter_recipe, tmp_path, monkeypatch, capsys):
    """What was saved before its version was written down counts as the first."""
    out = ["--set", f"run.out={tmp_path / 'run'}"]
    monkeypatch.setattr(keeping, "ARITHMETIC", 1)
    assert main([str(adapter_recipe), *out, "--set", "train.steps=4"]) == 0
    capsys.readouterr()
    assert main([str(adapter_recipe), *out, "--set", "train.steps=5"]) == 0
    assert "round otherwise" not in capsys.readouterr().err
    monkeypatch.setattr(keeping, "ARITHMETIC", 2)
    assert main([str(adapter_recipe), *out, "--set", "train.steps=6"]) == 0
    assert "until step 5 this run was trained by a version whose adapters round otherwise" in capsys.readouterr().err
