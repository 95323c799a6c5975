"""Power loss: every state that a disk may be left in gives the old or the new, and what was said to be saved is there."""

import json
import os

import pytest
from flows import FLOWS, MAY_BE_MADE_AGAIN, loaded, put
from harness import Recorder, lay_out

from dedistill.io.atomic import write_synced
from dedistill.runs.checkpoint import list_checkpoints
from dedistill.runs.metrics import JsonlWriter


@pytest.fixture
def disk(tmp_path):
    (tmp_path / "disk").mkdir()
    return tmp_path / "disk"


@pytest.mark.parametrize("name", FLOWS)
def test_old_or_new_and_safe_once_it_is_said_to_be(disk, tmp_path, name):
    """Whatever the disk has forgotten: one whole version is read, the new one as soon as the save has returned."""
    flow = FLOWS[name]
    flow.prepare(disk)
    assert flow.read(disk) == flow.old
    with Recorder(disk) as power:
        flow.save(disk)
    read = lambda state: flow.read(lay_out(state, tmp_path / "after"))  # noqa: E731
    found = [read(state) for _, state in power.states]
    allowed = [flow.old, flow.new] + [None] * (name in MAY_BE_MADE_AGAIN)
    assert all(value in allowed for value in found) and flow.old in found and flow.new in found
    assert all(read(state) == flow.new for state in power.done), "said to be saved, but not safe"


def test_one_step_saved_twice_is_never_without_it(disk, tmp_path):
    """A run that stops at bad steps saves the step it is at, which may have been saved before."""
    put(disk, 10)
    with Recorder(disk) as power:
        put(disk, 10)
    assert {loaded(lay_out(state, tmp_path / "after")) for _, state in power.states} == {10}


def test_a_damaged_one_set_aside_leaves_the_good_one(disk, tmp_path):
    for step in (10, 20):
        put(disk, step)
    newest = list_checkpoints(disk / "run" / "checkpoints")[-1]
    (newest / "optimizer.safetensors").write_bytes(b"rot")
    with Recorder(disk) as power:
        assert loaded(disk) == 10
    assert {loaded(lay_out(state, tmp_path / "after")) for _, state in power.states} == {10}


def test_the_journal_has_every_row_up_to_the_checkpoint(disk, tmp_path):
    """A run that goes on from step 3 must find the rows of steps 1 to 3, or metrics.jsonl would have a hole in it."""
    with Recorder(disk) as power:
        journal = JsonlWriter(disk / "metrics.jsonl", 0)
        for step in range(1, 4):
            journal.write({"step": step})
        journal.sync()
        put(disk, 3)
        journal.write({"step": 4})
        put(disk, 4)
        journal.close()
    for _, state in power.states:
        folder = lay_out(state, tmp_path / "after")
        step = loaded(folder) or 0
        JsonlWriter(folder / "metrics.jsonl", step).close()
        rows = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert rows[: min(step, 3)] == list(range(1, min(step, 3) + 1))


def test_the_recorder_notices_what_is_not_synced(disk):
    """The harness itself: a careless save must be caught in all three ways."""
    (disk / "a").write_bytes(b"old!")
    with Recorder(disk) as power:
        (disk / "a.tmp").write_bytes(b"new!")
        os.replace(disk / "a.tmp", disk / "a")
    contents = {state.get("a") for _, state in power.states}
    assert contents == {b"old!", b"new!", b"", b"ne", bytes(4), b"ne\0\0"}
    with Recorder(disk) as power:
        write_synced(disk / "a.tmp", b"more")
        os.replace(disk / "a.tmp", disk / "a")
    assert {state.get("a") for _, state in power.states} == {b"new!", b"more"}
    assert {state.get("a") for state in power.done} == {b"new!", b"more"}, "the rename was never synced"
