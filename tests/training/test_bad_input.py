"""Bad input gets one clear error, loses nothing, and shows no traceback."""

import json
import os
import signal
import time

import pytest
import torch
from losses import in_training
from ranks import start_ranks
from runs import arguments
from safetensors.torch import load_file
from test_effects import idx_folder

from dedistill.io.atomic import step_of
from dedistill.objectives.base import Objective
from dedistill.runs.checkpoint import damage, list_checkpoints
from dedistill.train import main


def fails(capsys, recipe, *settings: str, code: int) -> str:
    assert main([str(recipe), *[a for s in settings for a in ("--set", s)]]) == code
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err


def test_misspelt_key_exits_2_with_file_and_line(adapter_recipe, capsys):
    text = adapter_recipe.read_text().replace("batch = 8", "bacth = 8")
    adapter_recipe.write_text(text)
    line = text.splitlines().index("bacth = 8") + 1
    err = fails(capsys, adapter_recipe, code=2)
    assert f"dedistill.toml:{line}: train.bacth" in err and "did you mean 'batch'" in err


@pytest.mark.parametrize(
    ("setting", "message", "code"),
    [
        ("adapter.targets.0.preset=modulatoin", "unknown preset 'modulatoin'", 2),
        ("model.family=pixelflux", "did you mean 'pixel_flux'?", 2),
        ("model.path=/nowhere", "/nowhere: no such folder", 2),
        ("base.exclude=['*.norm1']", "'*.norm1' matches no linear", 2),
    ],
)
def test_wrong_settings(adapter_recipe, capsys, setting, message, code):
    assert message in fails(capsys, adapter_recipe, setting, code=code)


def test_images_of_another_size_are_refused(adapter_recipe, tmp_path, capsys):
    settings = ["data.source=mnist", f"data.path={idx_folder(tmp_path)}"]
    assert "images are 1 x 32 x 32" in fails(capsys, adapter_recipe, *settings, code=2)


def test_adapter_that_matches_nothing_names_its_line(adapter_recipe, capsys):
    text = adapter_recipe.read_text().replace('preset = "blocks"', 'pattern = "transformer_block.*"')
    adapter_recipe.write_text(text)
    line = text.splitlines().index('pattern = "transformer_block.*"') + 1
    err = fails(capsys, adapter_recipe, code=2)
    assert f"dedistill.toml:{line}: adapter.targets.0.pattern: 'transformer_block.*' matches no linear" in err


def test_missing_data_is_named(teacher_recipe, tmp_path, capsys):
    text = teacher_recipe.read_text().replace('source = "digits"', f'source = "mnist"\npath = "{tmp_path}"')
    teacher_recipe.write_text(text)
    line = text.splitlines().index(f'path = "{tmp_path}"') + 1
    err = fails(capsys, teacher_recipe, code=1)
    assert (
        f"teacher.toml:{line}: data.path: neither train-images-idx3-ubyte nor train-images-idx3-ubyte.gz in '{tmp_path}'" in err
    )


def test_directory_of_another_recipe_is_refused_with_the_differences(adapter_recipe, capsys):
    assert main([str(adapter_recipe)]) == 0
    err = fails(capsys, adapter_recipe, "train.lr=5e-3", "adapter.init=ones", code=1)
    assert "holds a run of another recipe" in err
    assert "train.lr: 0.01 there, 0.005 here" in err and "adapter.init: 'perturbed_normal' there, 'ones' here" in err


def test_resume_never_refuses_a_used_directory(adapter_recipe, capsys):
    assert main([str(adapter_recipe)]) == 0
    assert "already holds a run" in fails(capsys, adapter_recipe, "run.resume=never", code=1)


def test_damaged_checkpoint_is_set_aside_and_the_older_one_used(adapter_recipe, tmp_path, capsys):
    assert main([str(adapter_recipe)]) == 0
    good = (tmp_path / "dedistill/metrics.jsonl").read_bytes()
    newest = list_checkpoints(tmp_path / "dedistill" / "checkpoints")[-1]
    raw = bytearray((newest / "trainable.safetensors").read_bytes())
    raw[-1] ^= 1
    (newest / "trainable.safetensors").write_bytes(raw)
    assert main([str(adapter_recipe)]) == 0
    err = capsys.readouterr().err
    assert "is damaged: trainable.safetensors differs" in err and "continued from step 4" in err
    assert (tmp_path / "dedistill/metrics.jsonl").read_bytes() == good


def test_second_process_in_one_directory_is_refused(adapter_recipe, tmp_path, capsys):
    import fcntl

    (tmp_path / "dedistill").mkdir()
    with open(tmp_path / "dedistill" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process is running" in fails(capsys, adapter_recipe, code=1)


def test_unwritable_directory(adapter_recipe, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert f"'{tmp_path / 'file'}' is a file" in fails(capsys, adapter_recipe, f"run.out={tmp_path / 'file' / 'run'}", code=1)


def test_non_finite_steps_change_nothing_and_stop_the_run(adapter_recipe, tmp_path, capsys, monkeypatch):
    """Named samples and sigmas, no update, stop at the third in a row; weights are those of the last good step."""
    calls = 0

    def poisoned(real, model, task):
        nonlocal calls
        calls += 1
        loss = real(model, task)
        return loss * torch.nan if calls in (2, 4, 5, 6) else loss

    monkeypatch.setattr(Objective, "loss", in_training(poisoned))
    err = fails(capsys, adapter_recipe, "checkpoint.every=1", "snapshot.every=1", code=1)
    assert "not finite 3 times in a row" in err and "digits/train/" in err
    rows = [json.loads(line) for line in (tmp_path / "dedistill/metrics.jsonl").read_text().splitlines()]
    assert [r["applied"] for r in rows] == [True, False, True, False, False]
    assert len(rows[1]["not_finite"]) == 8 and rows[1]["not_finite"][0]["sigma"] > 0
    read = lambda step: (tmp_path / f"dedistill/snapshots/step-{step:08d}.safetensors").read_bytes()  # noqa: E731
    strip = lambda raw: raw[8 + int.from_bytes(raw[:8], "little") :]  # noqa: E731 - tensors without the header
    assert strip(read(1)) == strip(read(2)) != strip(read(3)) == strip(read(5))


def test_a_stop_at_non_finite_steps_keeps_the_good_ones_and_remembers_the_bad(adapter_recipe, tmp_path, capsys, monkeypatch):
    """The weights are saved before stopping, and starting again does not grant three more bad steps."""
    calls = []

    def poisoned(real, model, task):
        calls.append(0)
        return real(model, task) * (torch.nan if len(calls) >= 3 else 1)

    plain = ["--set", "checkpoint.every=0"]
    assert main([str(adapter_recipe), *plain, "--set", f"run.out={tmp_path / 'good'}", "--set", "train.steps=2"]) == 0
    monkeypatch.setattr(Objective, "loss", in_training(poisoned))
    assert main([str(adapter_recipe), *plain]) == 1
    assert "not finite 3 times in a row" in capsys.readouterr().err and len(calls) == 5
    (saved,) = list_checkpoints(tmp_path / "dedistill" / "checkpoints")
    assert saved.name == "step-00000004"
    (good,) = list_checkpoints(tmp_path / "good" / "checkpoints")
    assert (saved / "trainable.safetensors").read_bytes()[-1000:] == (good / "trainable.safetensors").read_bytes()[-1000:]
    assert main([str(adapter_recipe), *plain]) == 1 and len(calls) == 6, "the third in a row, not the first of three"
    monkeypatch.undo()
    assert main([str(adapter_recipe), *plain]) == 0


def test_full_disk_keeps_the_last_good_checkpoint(adapter_recipe, tmp_path, capsys, small_disk):
    """A file size limit stands for a full disk; the message names path and bytes."""
    with small_disk(40_000):
        err = fails(capsys, adapter_recipe, code=1)
    assert "cannot write" in err and "bytes" in err
    assert not list(tmp_path.rglob("*.tmp-*"))
    assert main([str(adapter_recipe)]) == 0  # with room again, the run goes on


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_finishes_the_step_saves_and_says_how_to_continue(adapter_recipe, tmp_path, number):
    """(A launcher's processes: test_launch.py.)"""
    settings = ["train.steps=100000", "validate.every=99999"]  # or the last row is left to the next start
    (process,) = start_ranks(1, main, arguments(adapter_recipe, tmp_path / "run", *settings), said=tmp_path / "said")
    journal = tmp_path / "run" / "metrics.jsonl"
    for _ in range(600):
        if journal.exists() and journal.stat().st_size > 2000:
            break
        time.sleep(0.1)
    os.kill(process.pid, number)
    process.join(timeout=60)
    err = (tmp_path / "said/0").read_text()
    assert process.exitcode == 75 and "Traceback" not in err
    newest = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    step = step_of(newest)
    assert damage(newest) == "" and f"stopped and saved at step {step}" in err
    assert f"python -m dedistill.train {adapter_recipe}" in err
    assert json.loads(journal.read_text().splitlines()[-1])["step"] == step


def test_wandb_offline_and_broken_never_stop_a_run(adapter_recipe, tmp_path, capsys, monkeypatch):
    """It changes nothing, either. (One that works: test_effects.py.)"""
    from accelerate import Accelerator

    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(Accelerator, "log", lambda *a, **k: 1 / 0)
    assert main([str(adapter_recipe), "--set", "log.wandb=true", "--debug"]) == 0
    assert "is switched off" in capsys.readouterr().err
    assert list((tmp_path / "dedistill" / "wandb").glob("offline-run-*"))
    plain = tmp_path / "plain"
    assert main([str(adapter_recipe), "--set", f"run.out={plain}"]) == 0
    assert (plain / "metrics.jsonl").read_bytes() == (tmp_path / "dedistill/metrics.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("text", "has"),
    [
        ("machine api.wandb.ai login user password x", True),
        ("machine a.com login b password c", False),
        ("junk {", False),
    ],
)
def test_only_a_key_of_wandb_counts_as_one(tmp_path, monkeypatch, text, has):
    """A password of some other host is no reason to go online."""
    from dedistill.runs.metrics import _has_key

    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _has_key() is False
    (tmp_path / ".netrc").write_text(text + "\n")
    assert _has_key() is has
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert _has_key() is True


def test_weights_that_a_finite_step_blows_up_are_never_saved(adapter_recipe, tmp_path, capsys):
    """The step itself was finite; the weights after it are not."""
    err = fails(capsys, adapter_recipe, "train.lr=0.1", "train.weight_decay=1e60", "checkpoint.every=1", code=1)
    assert "not finite" in err and "intact" in err
    for checkpoint in list_checkpoints(tmp_path / "dedistill" / "checkpoints"):
        tensors = load_file(checkpoint / "trainable.safetensors")
        assert all(t.isfinite().all() for t in tensors.values())


def test_a_signal_between_steps_still_saves(adapter_recipe, tmp_path, monkeypatch):
    """Asked for while the row is shown, after the checkpoint was decided."""
    from dedistill.runs import pace as live

    def interrupting(rows, *_):
        for row in rows:
            if row["step"] == 3:
                os.kill(os.getpid(), signal.SIGINT)
            yield row

    monkeypatch.setattr(live, "progress", interrupting)
    assert main([str(adapter_recipe), "--set", "checkpoint.every=0"]) == 75
    assert [p.name for p in list_checkpoints(tmp_path / "dedistill" / "checkpoints")] == ["step-00000004"]


def test_a_start_leaves_the_users_files_alone(adapter_recipe, tmp_path):
    mine = tmp_path / "dedistill" / "sub" / "thesis.tmp-backup"
    mine.mkdir(parents=True)
    assert main([str(adapter_recipe)]) == 0 and main([str(adapter_recipe)]) == 0
    assert mine.exists()
