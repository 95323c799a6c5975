"""The three-way oracle: resumed = uninterrupted, bit for bit, and != weights only. Then the oracle itself is tested."""

import os
import shutil
import signal

import pytest
import torch
from harness import count_operations, killed_before
from runs import Killing, arguments, differences, quietly, rewrite, train
from tiny_recipes import ADAPTER

from dedistill.runs.checkpoint import list_checkpoints
from dedistill.train import main
from dedistill.training.trainer import Trainer

SETTINGS = ("checkpoint.every=1", "snapshot.every=2", "validate.every=100")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, base_model):
    folder = tmp_path_factory.mktemp("oracle")
    (folder / "recipe.toml").write_text(ADAPTER.format(out=folder, base=base_model))
    return folder / "recipe.toml"


@pytest.fixture(scope="module")
def uninterrupted(recipe):
    return train(recipe, recipe.parent / "a", *SETTINGS)


@pytest.fixture(scope="module")
def stopped(recipe):
    """A run that was asked to stop after its third step."""
    real = Trainer.train_step

    def asked(self, step, tasks):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, step, tasks)

    Trainer.train_step = asked
    try:
        assert main(arguments(recipe, recipe.parent / "b", *SETTINGS)) == 75
    finally:
        Trainer.train_step = real
    assert list_checkpoints(recipe.parent / "b" / "checkpoints")[-1].name == "step-00000003"
    return recipe.parent / "b"


@pytest.fixture
def interrupted(stopped, tmp_path):
    return shutil.copytree(stopped, tmp_path / "b")


def zero(group: str, key: str):
    def change(groups: dict, facts: dict) -> None:
        name = next(n for n in groups[group] if n.endswith(key))
        groups[group][name] = torch.zeros_like(groups[group][name])

    return change


def one_bit(groups: dict, facts: dict) -> None:
    tensor = next(t for t in groups["trainable"].values() if t.dim() and t.count_nonzero())
    at = int(tensor.reshape(-1).abs().argmax())
    tensor.view(torch.int32).reshape(-1)[at] ^= 1


BROKEN = {
    "weights only": lambda groups, facts: groups["optimizer"].clear(),
    "first moments lost": zero("optimizer", "/exp_avg"),
    "second moments lost": zero("optimizer", "/exp_avg_sq"),
    "the optimizer's count of steps lost": zero("optimizer", "/step"),
    "one bit of one weight": one_bit,
    "a step repeated": lambda groups, facts: facts.update(step=2),
    "a step left out": lambda groups, facts: facts.update(step=4),
    "the guard's history forgotten": lambda groups, facts: facts["guard"]["norms"].clear(),
    "skipped steps forgotten": lambda groups, facts: facts.update(skipped=facts["skipped"] + 1),
}


def test_resumed_is_uninterrupted(recipe, uninterrupted, interrupted):
    assert differences(uninterrupted, train(recipe, interrupted, *SETTINGS)) == []


@pytest.mark.parametrize("what", BROKEN)
def test_the_oracle_notices(recipe, uninterrupted, interrupted, what):
    """Its own mutation check: whatever is lost from a checkpoint, it sees."""
    rewrite(interrupted, BROKEN[what])
    assert differences(uninterrupted, train(recipe, interrupted, *SETTINGS)) != []


@pytest.mark.slow  # at operations: the next test
def test_killed_at_random_times(recipe, uninterrupted, tmp_path):
    """A few times; ``python -m tests.faults.campaign`` does hundreds."""
    killing = Killing(recipe, tmp_path / "killed", uninterrupted, SETTINGS)
    killing.run(4, longest=1.0)
    assert (killing.kills, killing.corrupt, killing.different) == (4, 0, 0)
    assert killing.most_lost <= 2, "the interval of one step, and the step that was trained during a save"


def test_killed_at_operations_of_a_whole_run(recipe, uninterrupted, tmp_path):
    """Before operations on everything that a run writes: locks, recipe, journal, snapshots, checkpoints, pruning."""
    points = count_operations(lambda: train(recipe, tmp_path / "count", *SETTINGS))
    for point in range(2, len(points), len(points) // 3):
        out = tmp_path / f"p{point}"
        assert killed_before(point, quietly(lambda out=out: train(recipe, out, *SETTINGS)))
        train(recipe, out, *SETTINGS)
        assert differences(uninterrupted, out) == [], points[point - 1]
        assert not list(out.rglob("*.tmp-*")), "what the killed one left is swept"
        shutil.rmtree(out)
