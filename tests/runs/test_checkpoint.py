"""Checkpoints: whole or absent, hashed, two kept, damaged ones refused by name and set aside."""

import json
import os
import shutil
import signal

import pytest
import torch

from dedistill.errors import UserError
from dedistill.io.atomic import checksummed, read_checksummed
from dedistill.runs import checkpoint as ck
from tests.faults.harness import forked


def group(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"trainable": {"w": torch.full((64,), value)}, "optimizer": {"w/exp_avg": torch.full((64,), -value)}}


@pytest.fixture
def folder(tmp_path):
    for step in (10, 20, 30):
        ck.save_checkpoint(tmp_path, step, group(step), {"skipped": 0}, keep=2)
    return tmp_path


def test_newest_good_one_is_read_back(folder):
    newest, notes = ck.newest_valid(folder)
    groups, manifest = ck.read_checkpoint(newest)
    assert newest.name == "step-00000030" and notes == [] and manifest["step"] == 30
    assert groups["trainable"]["w"][0] == 30 and groups["optimizer"]["w/exp_avg"][0] == -30
    assert [p.name for p in ck.list_checkpoints(folder)] == ["step-00000020", "step-00000030"]


@pytest.mark.parametrize("name", ["trainable.safetensors", "optimizer.safetensors", "manifest.json"])
@pytest.mark.parametrize("bit", [3, 1000, -2])
def test_any_flipped_bit_is_found_and_named(folder, name, bit):
    """Safetensors itself loads such a file without an error."""
    path = folder / "step-00000030" / name
    raw = bytearray(path.read_bytes())
    raw[bit % len(raw)] ^= 16
    path.write_bytes(raw)
    newest, notes = ck.newest_valid(folder)
    assert newest.name == "step-00000020"
    assert len(notes) == 1 and name in notes[0] and (folder / "step-00000030.bad").exists()


@pytest.mark.parametrize("hurt", ["truncate", "remove", "zero"])
def test_truncated_missing_and_zeroed_files_are_found(folder, hurt):
    path = folder / "step-00000030" / "trainable.safetensors"
    raw = path.read_bytes()
    if hurt == "remove":
        path.unlink()
    else:
        path.write_bytes(raw[:-5] if hurt == "truncate" else raw[:100] + bytes(len(raw) - 100))
    assert "trainable.safetensors" in ck.damage(folder / "step-00000030")
    assert ck.newest_valid(folder)[0].name == "step-00000020"


def test_files_of_two_steps_swapped_are_found(folder):
    os.rename(folder / "step-00000020", folder / "x")
    os.rename(folder / "step-00000030", folder / "step-00000020")
    os.rename(folder / "x", folder / "step-00000030")
    with pytest.raises(UserError, match="no good checkpoint is left"):
        ck.newest_valid(folder)


def test_only_bad_ones_stop_the_run_again_and_again(folder):
    for p in ck.list_checkpoints(folder):
        (p / "manifest.json").write_text("{}")
    for _ in range(2):  # also the second start must not begin anew in silence
        with pytest.raises(UserError, match="no good checkpoint is left"):
            ck.newest_valid(folder)


def test_a_rotten_checkpoint_does_not_count_as_kept(folder):
    """With the older of two rotten, the next save keeps the good ones and drops what is older than both."""
    (folder / "step-00000030" / "optimizer.safetensors").write_bytes(b"rot")
    ck.save_checkpoint(folder, 40, group(40), {"skipped": 0}, keep=2)
    assert [p.name for p in ck.list_checkpoints(folder) if not ck.damage(p)] == ["step-00000020", "step-00000040"]
    ck.save_checkpoint(folder, 50, group(50), {"skipped": 0}, keep=2)
    assert [p.name for p in ck.list_checkpoints(folder)] == ["step-00000040", "step-00000050"]


def test_empty_folder_is_a_fresh_start(tmp_path):
    assert ck.newest_valid(tmp_path / "none") == (None, [])


@pytest.mark.parametrize("fails_at", range(1, 7))
def test_write_error_leaves_nothing_behind_and_the_old_ones_intact(folder, monkeypatch, fails_at):
    """ENOSPC at every file of a save names the path and the bytes."""
    calls = 0
    real = os.fsync

    def fsync(fd):
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise OSError(28, "No space left on device")
        return real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UserError, match=r"cannot write '.*tmp.*'( \([\d,]+ bytes\))?: No space left on device"):
        ck.save_checkpoint(folder, 40, group(40), {"skipped": 0}, keep=2)
    monkeypatch.undo()
    assert [p.name for p in folder.iterdir() if "tmp" in p.name] == []
    assert [p.name for p in ck.list_checkpoints(folder)] == ["step-00000020", "step-00000030"]
    assert all(ck.damage(p) == "" for p in ck.list_checkpoints(folder))


def save_and_crash(folder, point: int) -> int:
    """Save step 40 in a forked process that kills itself before its ``point``-th sync, rename or open; its exit status."""
    if child := os.fork():
        return os.waitpid(child, 0)[1]
    count = 0

    def crashing(real):
        def wrapped(*a, **k):
            nonlocal count
            count += 1
            if count == point:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*a, **k)

        return wrapped

    try:
        for name in ("fsync", "rename", "open"):
            setattr(os, name, crashing(getattr(os, name)))
        ck.save_checkpoint(folder, 40, group(40), {"skipped": 0}, keep=2)
    finally:
        os._exit(0)


def test_killed_at_any_point_of_a_save_the_newest_whole_one_loads(folder):
    """SIGKILL before every fsync, rename and directory open of the save path."""
    survived, points = set(), 0
    for point in range(1, 60):
        status = save_and_crash(folder, point)
        newest, notes = ck.newest_valid(folder)
        assert notes == [] and newest.name in ("step-00000030", "step-00000040")
        assert float(ck.read_checkpoint(newest)[0]["trainable"]["w"][0]) == int(newest.name[-2:])
        survived.add(newest.name)
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        points += 1
        for left in folder.glob("*.tmp-*"):
            shutil.rmtree(left)
    assert points >= 6 and survived == {"step-00000030", "step-00000040"}


def as_another_user(checkpoint, file):
    os.chmod(checkpoint / file, 0)
    for place in (checkpoint, *checkpoint.parents):
        os.chmod(place, place.stat().st_mode | 0o055) if place.stat().st_uid == os.getuid() else None
    if os.getuid() == 0:
        os.setresuid(65534, 65534, 65534)


def by_a_link_to_itself(checkpoint, file):
    (checkpoint / file).unlink()
    (checkpoint / file).symlink_to(file)


def by_a_disk_that_fails(checkpoint, file):
    (checkpoint / file).unlink()
    (checkpoint / file).symlink_to("/proc/self/mem")  # reading its first byte is an input/output error


@pytest.mark.parametrize(
    ("refuse", "file"),
    [
        (as_another_user, "manifest.json"),
        (as_another_user, "trainable.safetensors"),
        (by_a_link_to_itself, "manifest.json"),
        (by_a_link_to_itself, "trainable.safetensors"),
        (by_a_disk_that_fails, "manifest.json"),
    ],
)
def test_what_cannot_be_read_is_not_taken_for_damaged(folder, refuse, file):
    """It may be whole. Nothing is set aside, and no older one gone on with; a save beside it succeeds and leaves it."""
    checkpoint = folder / "step-00000030"

    def look():
        refuse(checkpoint, file)
        with pytest.raises(UserError, match="cannot be read, so that nothing is known of it"):
            ck.newest_valid(folder)

    assert forked(look) == 0
    assert checkpoint.is_dir() and not list(folder.glob("*.bad"))


def test_a_save_goes_on_beside_one_that_cannot_be_read(folder):
    by_a_link_to_itself(folder / "step-00000020", "manifest.json")
    for step in (40, 50):
        ck.save_checkpoint(folder, step, group(step), {"skipped": 0}, keep=2)
    assert [p.name for p in ck.list_checkpoints(folder)] == ["step-00000040", "step-00000050"]


def test_manifest_says_what_is_inside(folder):
    manifest = json.loads((folder / "step-00000030" / "manifest.json").read_text())
    assert len(manifest["seal"]) == 64
    assert manifest["schema"] == 2 and manifest["skipped"] == 0
    assert set(manifest["files"]) == {"trainable.safetensors", "optimizer.safetensors"}
    assert all({"bytes", "sha256"} == set(entry) for entry in manifest["files"].values())


OTHER_KINDS = [{"files": []}, {"files": {}}, {"files": {"a": 5}}, {"files": {"../../x": {"bytes": 1, "sha256": ""}}}]


@pytest.mark.parametrize("change", [*OTHER_KINDS, {"guard": [1]}, {"skipped": "many"}, {"unfinished": "row"}])
def test_a_manifest_of_other_kinds_is_damage(tmp_path, change):
    checkpoint = ck.save_checkpoint(tmp_path, 1, group(1), {"guard": {}, "skipped": 0, "unfinished": None}, keep=1)
    assert ck.damage(checkpoint) == ""
    file = checkpoint / "manifest.json"
    file.write_bytes(checksummed(read_checksummed(file) | change))
    assert f"manifest.json has '{next(iter(change))}' of another kind" in ck.damage(checkpoint)
