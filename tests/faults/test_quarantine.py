"""Spikes and samples that spoil steps: not applied, named, left out from there on, and the run goes on as if without them."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from losses import in_training
from ranks import run_ranks
from runs import arguments, differences, train
from tiny_recipes import ADAPTER

from dedistill.data.digits import load_digits
from dedistill.objectives.base import Objective
from dedistill.runs.checkpoint import list_checkpoints, read_checkpoint
from dedistill.train import main
from dedistill.training import guards
from dedistill.training.trainer import Trainer

SETTINGS = ("train.steps=12", "checkpoint.every=3", "checkpoint.keep=4", "snapshot.every=0", "validate.every=99")
HITS = (6, 7, 8)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, base_model):
    folder = tmp_path_factory.mktemp("quarantine")
    (folder / "recipe.toml").write_text(ADAPTER.format(out=folder, base=base_model))
    return folder / "recipe.toml"


@pytest.fixture(scope="module")
def good(recipe):
    """A run without bad samples."""
    return train(recipe, recipe.parent / "good", *SETTINGS)


@pytest.fixture(scope="module")
def spoilt(recipe):
    """Runs where the samples are bad, by what they are: their directories, and what was said."""
    found = {}
    for kind in ("nan", "spike"):
        out, said = recipe.parent / kind, recipe.parent / f"said-{kind}"
        assert run_ranks(1, _spoilt, arguments(recipe, out, *SETTINGS), kind, said=said) == [0], (said / "0").read_text()
        found[kind] = out, (said / "0").read_text()
    return found


@pytest.fixture(autouse=True)
def early(monkeypatch):
    """Spikes are known after four steps."""
    monkeypatch.setattr(guards, "WARM_UP", 4)


def bad_names() -> list[str]:
    """The sample at position 1 of each of the steps HITS."""
    return [load_digits(0.2).slots(0, step, 8)[1].name for step in HITS]


def spoil(monkeypatch, kind: str) -> None:
    """Each of ``bad_names`` is bad wherever it is drawn: not finite, or a thousand times too far away."""
    real, names = Objective.noisy_batch, set(bad_names())

    def task(self, step, positions):
        found = real(self, step, positions)
        target = found.target.clone()
        for row, name in enumerate(found.names):
            if name in names:
                target[row] = torch.nan if kind == "nan" else target[row] * 1000
        return replace(found, target=target)

    monkeypatch.setattr(Objective, "noisy_batch", task)


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", ["nan", "spike"])
def test_bad_samples_are_left_out_and_the_run_goes_on(good, spoilt, kind):
    """No step was trained on one, the others are as they would be, and all steps are trained in the end."""
    run, said = spoilt[kind]
    assert "step 7 and those after it: 3 samples stand out" in said and "trained again from step 7 on" in said
    found = rows(run)
    assert [r["step"] for r in found] == list(range(1, 13)) and all(r["applied"] for r in found)
    assert [e["sample"] for e in found[6]["quarantined"]] == bad_names() and found[6]["quarantined"][0]["sigma"] > 0
    _, manifest = read_checkpoint(list_checkpoints(run / "checkpoints")[-1])
    assert manifest["skipped"] == 0 and set(manifest["guard"]["quarantine"]) == set(bad_names())
    whole = rows(good)
    assert whole[:6] == found[:6] and all(a["sigma_mean"] == b["sigma_mean"] for a, b in zip(whole, found))
    assert [a["loss"] == b["loss"] for a, b in zip(whole, found)][6:9] == [False] * 3


def test_what_is_left_out_is_logged_between_logged_steps(recipe, tmp_path, monkeypatch):
    spoil(monkeypatch, "nan")
    found = rows(train(recipe, tmp_path / "run", *SETTINGS, "log.every=5"))
    assert [len(r["quarantined"]) for r in found if "quarantined" in r] == [3]


def test_back_to_before_anything_was_applied(recipe, tmp_path, monkeypatch):
    """A first step that is not applied leaves a checkpoint without moments: going back to it is going back to none."""
    real = Objective.noisy_batch

    def task(self, step, positions):
        found = real(self, step, positions)
        return replace(found, target=found.target * torch.nan) if step == 0 else found

    monkeypatch.setattr(Objective, "noisy_batch", task)
    spoil(monkeypatch, "nan")
    early, late = (train(recipe, tmp_path / e, *SETTINGS, f"checkpoint.every={e}") for e in ("1", "100"))
    monkeypatch.undo()
    assert differences(early, late) == []


def test_one_bad_step_is_skipped_and_named(recipe, tmp_path, monkeypatch):
    """Nothing is left out for a single one."""
    monkeypatch.setattr("test_quarantine.HITS", (6,))
    spoil(monkeypatch, "spike")
    found = rows(train(recipe, tmp_path / "run", *SETTINGS))
    assert [r["applied"] for r in found] == [True] * 6 + [False] + [True] * 5
    assert [e["sample"] for e in found[6]["spike"]] == bad_names() and float(found[6]["grad_norm"]) > 20 * found[5]["grad_norm"]
    assert "quarantined" not in json.dumps(found)


def test_train_spike_says_what_a_spike_is(recipe, tmp_path, monkeypatch):
    """0 applies everything that is finite."""
    spoil(monkeypatch, "spike")
    assert all(r["applied"] for r in rows(train(recipe, tmp_path / "run", *SETTINGS, "train.spike=0")))


def test_the_way_back_makes_no_difference(recipe, tmp_path, monkeypatch):
    """From a checkpoint just before, from one long before, or without any: the same bits, averages included."""
    spoil(monkeypatch, "nan")
    tracked = (*SETTINGS, "snapshot.every=4", "snapshot.ema=[0.05, 0.1]")
    usual = train(recipe, tmp_path / "usual", *tracked)
    for every in (0, 1):
        run = train(recipe, tmp_path / f"run{every}", *tracked, f"checkpoint.every={every}", "checkpoint.keep=2")
        assert differences(usual, run) == [], every


@pytest.mark.parametrize("every", [0, 1])
def test_the_very_first_steps(recipe, tmp_path, monkeypatch, every):
    """There is nothing yet to go back to, and no state of the optimizer."""
    monkeypatch.setattr("test_quarantine.HITS", (0, 1, 2))
    spoil(monkeypatch, "nan")
    found = rows(train(recipe, tmp_path / "run", *SETTINGS, f"checkpoint.every={every}"))
    assert [r["step"] for r in found] == list(range(1, 13)) and all(r["applied"] for r in found)
    assert len(found[0]["quarantined"]) == 3 and "val_loss_start" in found[0]


@pytest.mark.parametrize("at", [3, 7])
def test_interrupted_anywhere_the_run_is_the_same(recipe, spoilt, tmp_path, monkeypatch, at):
    """The quarantine and all the guard knows are in the checkpoint; hits before a stop count after it."""
    spoil(monkeypatch, "spike")
    real, sent = Trainer.train_step, []

    def step(self, number, tasks):
        if number == at and not sent:
            sent.append(os.kill(os.getpid(), 15))
        return real(self, number, tasks)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", step)
        assert main(arguments(recipe, tmp_path / "run", *SETTINGS)) == 75
    assert differences(spoilt["spike"][0], train(recipe, tmp_path / "run", *SETTINGS)) == []


def test_killed_after_going_back_the_run_is_the_same(recipe, spoilt, tmp_path, monkeypatch):
    """What is left is a checkpoint from before the quarantine: the same steps find the same samples again."""
    spoil(monkeypatch, "nan")
    whole = spoilt["nan"][0]
    copy = shutil.copytree(whole, tmp_path / "copy")
    for checkpoint in list_checkpoints(copy / "checkpoints"):
        if checkpoint.name > "step-00000006":
            shutil.rmtree(checkpoint)
    assert differences(whole, train(recipe, copy, *SETTINGS)) == []


def _spoilt(given: list[str], kind: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guards, "WARM_UP", 4)
        spoil(patch, kind)
        return main(given)


def test_every_number_of_processes_leaves_out_the_same(recipe, tmp_path):
    """All ranks agree; with exact sums to the bit."""
    found = {}
    for size in (1, 2):
        out = tmp_path / str(size)
        given, said = arguments(recipe, out, *SETTINGS, "train.exact=true"), tmp_path / f"said{size}"
        assert run_ranks(size, _spoilt, given, "nan", said=said) == [0] * size, (said / "0").read_text()
        found[size] = out
    assert differences(found[1], found[2]) == []
    assert rows(found[1])[6]["quarantined"]


def test_where_going_back_does_not_help_the_run_stops(recipe, tmp_path, monkeypatch, capsys):
    """The first of the batch is bad whatever stands there: it is not for the sample."""

    def loss(real, model, task):
        return real(model, task) * torch.tensor([torch.nan] + [1.0] * (len(task.names) - 1))

    monkeypatch.setattr(Objective, "loss", in_training(loss))
    assert main(arguments(recipe, tmp_path / "run", *SETTINGS)) == 1
    assert "samples were quarantined before" in capsys.readouterr().err
    assert list_checkpoints(tmp_path / "run" / "checkpoints")
