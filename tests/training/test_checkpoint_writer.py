"""Saving beside training: the copy is of its step, errors surface, the last save is awaited."""

import threading

import pytest
import torch
from safetensors.torch import load_file

from dedistill.errors import UserError
from dedistill.runs import checkpoint
from dedistill.runs.checkpoint import list_checkpoints
from dedistill.train import main
from dedistill.training import keeping
from dedistill.training.keeping import AsyncCheckpointWriter
from dedistill.training.trainer import Trainer


def test_one_at_a_time_and_errors_surface():
    gate, order, writer = threading.Event(), [], AsyncCheckpointWriter()
    writer.start({}, lambda _: (gate.wait(), order.append(1)))
    writer.check()  # still running: nothing to say
    gate.set()
    writer.start({}, lambda _: order.append(2))
    writer.wait()
    assert order == [1, 2]

    def fails(_):
        raise UserError("cannot write")

    writer.start({}, fails)
    with pytest.raises(UserError, match="cannot write"):
        writer.start({}, lambda _: order.append(3))
    writer.wait()
    writer.close()
    assert order == [1, 2]


def test_copies_are_private_and_their_memory_is_used_again():
    """In the file is what a tensor was when the save began, in each save anew."""
    weights, seen, memory, writer = torch.zeros(4), [], set(), AsyncCheckpointWriter()
    for number in range(3):
        gate = threading.Event()

        def write(groups, gate=gate):
            gate.wait()
            seen.append(groups["a"]["w"].tolist())
            memory.add(groups["a"]["w"].data_ptr())

        weights.fill_(number)
        writer.start({"a": {"w": weights}}, write)
        weights.fill_(-1)
        gate.set()
    writer.wait()
    writer.close()
    assert seen == [[0.0] * 4, [1.0] * 4, [2.0] * 4]
    assert len(memory) == 1 and weights.data_ptr() not in memory


def test_what_is_saved_is_of_its_step(adapter_recipe, tmp_path, monkeypatch):
    """Training goes on, and changes every tensor, while a slow writer has not begun."""
    plain = tmp_path / "plain"
    assert main([str(adapter_recipe), "--set", f"run.out={plain}", "--set", "snapshot.every=1"]) == 0
    released, real = threading.Event(), keeping.save_checkpoint
    steps = []

    def slow(folder, step, *rest, keep):
        if step == 2:
            assert released.wait(30)
        return real(folder, step, *rest, keep=keep)

    step = Trainer.train_step

    def stepping(self, number, tasks):
        row = step(self, number, tasks)
        steps.append(number)
        if number == 3:
            released.set()
        return row

    monkeypatch.setattr(keeping, "save_checkpoint", slow)
    monkeypatch.setattr(Trainer, "train_step", stepping)
    out = tmp_path / "slow"
    assert main([str(adapter_recipe), "--set", f"run.out={out}", "--set", "snapshot.every=1"]) == 0
    assert released.is_set() and steps == [0, 1, 2, 3, 4, 5]
    for saved in list_checkpoints(out / "checkpoints"):
        weights, snapshot = (
            load_file(saved / "trainable.safetensors"),
            load_file(plain / "snapshots" / f"{saved.name}.safetensors"),
        )
        assert all(torch.equal(weights[name], snapshot[name]) for name in snapshot)


@pytest.mark.parametrize("fails_at", [2, 4, 6])
def test_a_save_that_fails_stops_the_run_with_its_reason(adapter_recipe, tmp_path, monkeypatch, capsys, fails_at):
    """At the next step, or at the end for the last one; what was saved before is intact."""
    real = keeping.save_checkpoint

    def failing(folder, step, *rest, keep):
        if step == fails_at:
            raise UserError(f"cannot write step {step}")
        return real(folder, step, *rest, keep=keep)

    monkeypatch.setattr(keeping, "save_checkpoint", failing)
    assert main([str(adapter_recipe)]) == 1
    assert f"cannot write step {fails_at}" in capsys.readouterr().err
    kept = list_checkpoints(tmp_path / "dedistill" / "checkpoints")
    assert [p.name[-1] for p in kept] == [str(s) for s in (2, 4) if s < fails_at]
    assert all(checkpoint.damage(p) == "" for p in kept)
    monkeypatch.undo()
    assert main([str(adapter_recipe)]) == 0
