"""Power loss: every state that a disk may be left in gives the old or the new, and what was said to be saved is there."""

import json
import os
from pathlib import Path

import pytest
import torch
from harness import Recorder, lay_out
from safetensors.torch import save

from dedistill.data.cache import Store
from dedistill.engine.checkpoint import list_checkpoints, newest_valid, read_checkpoint, save_checkpoint
from dedistill.engine.metrics import Journal
from dedistill.files import replace_json, whole_folder, write_synced
from dedistill.posthoc.lerp import find_snapshots, lerp_snapshots


def group(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"trainable": {"w": torch.full((8,), value)}, "optimizer": {"w/exp_avg": torch.full((8,), -value)}}


def put(folder: Path, step: int) -> None:
    save_checkpoint(folder / "run" / "checkpoints", step, group(step), {"skipped": 0}, keep=2)


def loaded(folder: Path) -> int | None:
    """The step that would be continued from, after checking that all of it is of that step."""
    newest, _ = newest_valid(folder / "run" / "checkpoints")
    if newest is None:
        return None
    groups, manifest = read_checkpoint(newest)
    assert torch.equal(groups["trainable"]["w"], torch.full((8,), float(manifest["step"])))
    assert torch.equal(groups["optimizer"]["w/exp_avg"], torch.full((8,), -float(manifest["step"])))
    return manifest["step"]


@pytest.mark.parametrize("before", [[], [10], [10, 20]])
def test_a_checkpoint_is_the_old_one_or_the_new_one(tmp_path, before):
    """T3; RELIABILITY promises 1 and 6. Also the very first, whose folders are new themselves."""
    disk = tmp_path / "disk"
    disk.mkdir()
    for step in before:
        put(disk, step)
    with Recorder(disk) as power:
        put(disk, 30)
    found = {loaded(lay_out(state, tmp_path / "after")) for _, state in power.states}
    assert found == {before[-1] if before else None, 30}
    assert {loaded(lay_out(state, tmp_path / "after")) for state in power.done} == {30}, "said to be saved, but not safe"
    assert len(power.states) > 10


def test_one_step_saved_twice_is_never_without_it(tmp_path):
    """A run that stops at bad steps saves the step it is at, which may have been saved before."""
    disk = tmp_path / "disk"
    disk.mkdir()
    put(disk, 10)
    with Recorder(disk) as power:
        put(disk, 10)
    assert {loaded(lay_out(state, tmp_path / "after")) for _, state in power.states} == {10}


def test_a_damaged_one_set_aside_leaves_the_good_one(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    for step in (10, 20):
        put(disk, step)
    newest = list_checkpoints(disk / "run" / "checkpoints")[-1]
    (newest / "optimizer.safetensors").write_bytes(b"rot")
    with Recorder(disk) as power:
        assert loaded(disk) == 10
    assert {loaded(lay_out(state, tmp_path / "after")) for _, state in power.states} == {10}


def test_plan_recipe_and_inputs_are_old_or_new(tmp_path):
    """plan.json, recipe.json and inputs.json are written by the same function."""
    disk = tmp_path / "disk"
    disk.mkdir()
    replace_json(disk / "plan.json", {"steps": 1})
    with Recorder(disk) as power:
        replace_json(disk / "plan.json", {"steps": 2})
    read = lambda state: json.loads((lay_out(state, tmp_path / "after") / "plan.json").read_text())["steps"]  # noqa: E731
    assert {read(state) for _, state in power.states} == {1, 2} and {read(state) for state in power.done} == {2}


def test_a_model_folder_is_old_or_new_or_to_be_written_again(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()

    def export(step: int) -> None:
        with whole_folder(disk / "model") as folder:
            for name in ("weights", "config"):
                write_synced(folder / name, f"{name} {step}".encode())

    def read(folder: Path) -> int | None:
        if not (folder / "model").exists():
            return None
        texts = {p.name: p.read_text().split() for p in (folder / "model").iterdir()}
        assert texts.keys() == {"weights", "config"}, "a part of a folder"
        (step,) = {step for _, step in texts.values()}
        return int(step)

    export(1)
    with Recorder(disk) as power:
        export(2)
    assert {read(lay_out(state, tmp_path / "after")) for _, state in power.states} <= {None, 1, 2}
    assert {read(lay_out(state, tmp_path / "after")) for state in power.done} == {2}


def test_a_cache_shard_is_there_or_not(tmp_path):
    disk, inputs = tmp_path / "disk", {"vae": "x"}
    disk.mkdir()
    entry = lambda v: {f"k{v}": {"latent": torch.full((4,), float(v))}}  # noqa: E731
    with Recorder(disk) as power:
        store = Store(disk / "cache" / "latents", inputs)
        store.write(entry(1))
        first = len(power.states)
        store.write(entry(2))
    for i, (_, state) in enumerate(power.states):
        store = Store(lay_out(state, tmp_path / "after") / "cache" / "latents", inputs)
        assert store.damaged() == []
        assert i <= first or "k1" in store, "an entry of an earlier shard was lost"
        for v in (1, 2):
            assert f"k{v}" not in store or store.read(f"k{v}")["latent"].tolist() == [v] * 4


def test_averages_are_whole_or_not_there(tmp_path):
    disk = tmp_path / "disk"
    (disk / "snapshots").mkdir(parents=True)
    for step in (1, 2):
        (disk / "snapshots" / f"step-{step:08d}.safetensors").write_bytes(save({"w": torch.full((4,), float(step))}))
    with Recorder(disk) as power:
        (file,) = lerp_snapshots(find_snapshots(disk / "snapshots"), [0.5], disk / "posthoc")
    whole = file.read_bytes()
    for _, state in power.states:
        made = list((lay_out(state, tmp_path / "after") / "posthoc").glob("*.safetensors"))
        assert [p.read_bytes() for p in made] in ([], [whole])
    assert all(state["posthoc/" + file.name] == whole for state in power.done)


def test_the_journal_has_every_row_up_to_the_checkpoint(tmp_path):
    """A run that goes on from step 3 must find the rows of steps 1 to 3, or metrics.jsonl would have a hole in it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    with Recorder(disk) as power:
        journal = Journal(disk / "metrics.jsonl", 0)
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
        Journal(folder / "metrics.jsonl", step).close()
        rows = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert rows[: min(step, 3)] == list(range(1, min(step, 3) + 1))


def test_the_recorder_notices_what_is_not_synced(tmp_path):
    """The harness itself: a careless save must be caught in all three ways."""
    disk = tmp_path / "disk"
    disk.mkdir()
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
