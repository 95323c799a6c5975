"""A NaN wherever it may come from: no step is trained on it, and what is saved is free of it."""

from dataclasses import replace

import pytest
import torch
from losses import in_training
from runs import arguments
from safetensors.torch import load_file

from dedistill.objectives.base import Objective
from dedistill.runs.checkpoint import list_checkpoints, read_checkpoint
from dedistill.train import main
from dedistill.training.trainer import Trainer

AT = 2
"""The step, from 0, before which everything is as it should be."""


def in_latent(task, trainer):
    noisy = task.noisy.clone()
    noisy[1, 0, 0, 0] = torch.nan
    return replace(task, noisy=noisy)


def in_caption(task, trainer):
    text = trainer.model.encode(task.captions)
    text = text.each(torch.clone)
    text.tokens.embeds[1, 0, 0] = torch.nan
    return replace(task, text=text)


def in_gradient(task, trainer):
    parameter = next(iter(trainer.engine.trainable.values()))
    handle = parameter.register_hook(lambda grad: handle.remove() or grad * torch.inf)
    return task


def in_optimizer(task, trainer):
    next(s for s in trainer.engine.optimizer.state.values() if s)["exp_avg"].view(-1)[0] = torch.nan
    return task


PLACES = {"latent": in_latent, "caption embedding": in_caption, "loss": None, "gradient": in_gradient}


def poison(monkeypatch, place, *, steps) -> list:
    """Inject at ``steps``; returns the weights before and after each of them, as the steps come."""
    real_step, seen, now = Trainer.train_step, [], {}

    def step(self, number, tasks):
        now.update(step=number, trainer=self)
        before = {n: p.detach().clone() for n, p in self.engine.trainable.items()} if number in steps else None
        try:
            return real_step(self, number, tasks)
        finally:
            if before is not None:
                seen.append(all(torch.equal(before[n], p) for n, p in self.engine.trainable.items()))

    def loss(real_loss, model, task):
        if now["step"] not in steps:
            return real_loss(model, task)
        if place is None:
            return real_loss(model, task) * torch.nan
        return real_loss(model, place(task, now["trainer"]))

    monkeypatch.setattr(Objective, "loss", in_training(loss))
    monkeypatch.setattr(Trainer, "train_step", step)
    return seen


@pytest.mark.parametrize("place", PLACES)
def test_a_step_with_a_nan_changes_nothing_and_training_goes_on(adapter_recipe, tmp_path, monkeypatch, place):
    unchanged = poison(monkeypatch, PLACES[place], steps=(AT,))
    assert main(arguments(adapter_recipe, tmp_path / "run", "snapshot.every=1")) == 0
    assert unchanged == [True], "0 steps trained on it"
    last = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    groups, manifest = read_checkpoint(last)
    assert manifest["skipped"] == 1 and manifest["step"] == 6
    assert all(t.isfinite().all() for group in groups.values() for t in group.values())
    before, after = (load_file(tmp_path / f"run/snapshots/step-{s:08d}.safetensors") for s in (AT + 1, AT + 2))
    assert any(not torch.equal(before[n], after[n]) for n in before), "and then it learns again"


@pytest.mark.parametrize("every", [1, 3, 0])
def test_a_spoilt_optimizer_state_is_never_saved(adapter_recipe, tmp_path, monkeypatch, capsys, every):
    """Loss and gradient were fine, the update was not. Started again, the run goes on from the last good save."""
    real = Trainer.train_step

    def step(self, number, tasks):
        row = real(self, number, tasks)
        if number == AT:
            in_optimizer(None, self)
        return row

    monkeypatch.setattr(Trainer, "train_step", step)
    given = arguments(adapter_recipe, tmp_path / "run", f"checkpoint.every={every}", "snapshot.every=0", "train.steps=9")
    assert main(given) == 1
    assert "not saved" in capsys.readouterr().err
    assert len(list_checkpoints(tmp_path / "run" / "checkpoints")) == (AT if every == 1 else 0)
    monkeypatch.undo()
    assert main(given) == 0


@pytest.mark.parametrize(("place", "steps"), [("latent", 1), ("gradient", 2), ("caption embedding", 2)])
def test_a_run_of_which_no_step_was_applied_is_not_done(adapter_recipe, tmp_path, monkeypatch, capsys, place, steps):
    poison(monkeypatch, PLACES[place], steps=range(steps))
    asked = [
        arguments(adapter_recipe, tmp_path / "run", f"train.steps={n}", "validate.every=1", "train.warmup=0")
        for n in (steps, steps + 1)
    ]
    for _ in range(2):  # a second start says it again
        assert main(asked[0]) == 1
        said = capsys.readouterr().err
        assert f"none of the {steps} step" in said and "done" not in said
    poison(monkeypatch, PLACES[place], steps=())
    assert main(asked[1]) == 0
