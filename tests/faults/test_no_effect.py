"""A run that changes nothing, or not what was asked for, says so and stops."""

import pytest
import torch
from runs import arguments, last_row
from tiny_recipes import ADAPTER

from dedistill.models import model as assemble
from dedistill.runs.checkpoint import list_checkpoints
from dedistill.train import main
from dedistill.training import trainer as loop
from dedistill.training.engine import Engine, bit_sums
from dedistill.training.guards import ENOUGH, EVERY, ParameterChangeCheck
from dedistill.training.optim import KahanAdamW

SETTINGS = ("train.steps=9", "checkpoint.every=3", "validate.every=99")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, base_model):
    folder = tmp_path_factory.mktemp("effect")
    (folder / "recipe.toml").write_text(ADAPTER.format(out=folder, base=base_model))
    return folder / "recipe.toml"


def with_model(patch, change) -> None:
    """``change`` gets the first adapted layer's (name, module) of every model that is built."""
    real = assemble.build_model

    def build(*arguments):
        model = real(*arguments)
        change(next(iter(model.adapter.by_target.values())))
        return model

    patch.setattr(assemble, "build_model", build)


def no_step(patch):
    patch.setattr(torch.optim.AdamW, "step", lambda self: None)


def no_rate(patch):
    patch.setattr(loop, "learning_rate", lambda recipe, step: 0.0)


def frozen(patch):
    with_model(patch, lambda module: module.requires_grad_(False))


def no_gradient(patch):
    real = Engine.finish

    def finish(self):
        norm = real(self)
        for parameter in self.trainable.values():
            parameter.grad.zero_()
        return 0 * norm

    patch.setattr(Engine, "finish", finish)


def not_in_the_network(patch):
    with_model(patch, lambda module: module.restore())


def no_init(patch):
    patch.setattr(assemble, "initialise", lambda *a, **k: None)


CASES = {
    "the optimizer's step is left out": (no_step, "in 20 of 20 modules"),
    "a learning rate of zero": (no_rate, "in 20 of 20 modules"),
    "a frozen layer": (frozen, "in 1 of 20 modules, e.g. "),
    "gradients of exactly zero": (no_gradient, "in 20 of 20 modules"),
    "a layer that the network does not use": (not_in_the_network, "in 1 of 20 modules, e.g. "),
    "an init that is not done": (no_init, "adapter.init: 'perturbed_normal' did not take effect"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_without_effect_stops(recipe, tmp_path, monkeypatch, capsys, case):
    """At the first look, before anything is saved."""
    fault, message = CASES[case]
    fault(monkeypatch)
    assert main(arguments(recipe, tmp_path / "run", *SETTINGS)) == 1
    assert message in capsys.readouterr().err
    assert last_row(tmp_path / "run") <= 3 and not list_checkpoints(tmp_path / "run" / "checkpoints")


def test_a_rate_that_is_lost_later_is_found_at_the_next_look(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "learning_rate", lambda recipe, step: 1e-3 if step < 4 else 0.0)
    assert main(arguments(recipe, tmp_path / "run", *SETTINGS)) == 1
    assert "after step 9: 3 steps were applied, but nothing has changed in 20 of 20 modules" in capsys.readouterr().err
    assert [c.name for c in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000003", "step-00000006"]


def test_it_is_looked_without_any_interval(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("dedistill.training.trainer.EVERY", 4)
    no_step(monkeypatch)
    settings = ("train.steps=9", "checkpoint.every=0", "snapshot.every=0", "validate.every=99")
    assert main(arguments(recipe, tmp_path / "run", *settings)) == 1
    assert "after step 4: 4 steps were applied" in capsys.readouterr().err and EVERY == 100


@pytest.mark.parametrize("lr", [1e-6, 0.0])
def test_steps_below_the_rounding_of_bf16_count(lr):
    """A bf16 weight at 1 moves by 1/128 or not at all: what is kept beside it does."""
    weight = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    optimizer = KahanAdamW([weight], lr=lr or 1.0, betas=(0.9, 0.99), decay=0.0)
    for group in optimizer.param_groups:
        group["lr"] = lr
    change_check = ParameterChangeCheck(lambda: bit_sums({"w": weight}, optimizer), [["w"]])
    for _ in range(ENOUGH):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        change_check.applied += 1
    assert (weight == 1).all()
    if lr:
        return change_check.check(3)
    with pytest.raises(Exception, match=r"nothing has changed in 1 of 1 module, e.g. w"):
        change_check.check(3)


def test_one_bit_is_a_change():
    weight = torch.nn.Parameter(torch.full((1000,), 0.1))
    optimizer = torch.optim.AdamW([weight])
    change_check = ParameterChangeCheck(lambda: bit_sums({"w": weight}, optimizer), [["w"]])
    change_check.applied = ENOUGH
    weight.data.view(torch.int32)[77] ^= 1
    change_check.check(3)
    assert change_check.applied == 0
