"""Checksummed snapshots: what was changed, lost, renamed or brought from another run is refused by name."""

import shutil

import pytest
import torch
from averages import lerp_snapshots
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dedistill.adapters.files import read_tensors
from dedistill.errors import UserError
from dedistill.io.safetensors import CHECKSUM, ChecksummedReader, verify_checksum
from dedistill.posthoc.snapshots import PREVIOUS, find_snapshots, write_snapshot

STEPS = range(10, 210, 10)


def tensors(step: int, run: int = 0) -> dict[str, torch.Tensor]:
    return {"a.w": torch.arange(6.0).reshape(2, 3) + step + run, "b.w": torch.full((5,), 1.0 / step).bfloat16()}


def write(folder, steps=STEPS, run: int = 0):
    for step in steps:
        write_snapshot(folder, step, tensors(step, run), {"format": "pt", "dedistill.run": "r"})
    return folder


def path_of(folder, step: int):
    return folder / f"step-{step:08d}.safetensors"


def average(folder, out, skip=()) -> None:
    lerp_snapshots(find_snapshots(folder, skip), [0.5], out)


@pytest.fixture(scope="module")
def twenty(tmp_path_factory):
    return write(tmp_path_factory.mktemp("run") / "snapshots")


@pytest.fixture
def folder(twenty, tmp_path):
    return shutil.copytree(twenty, tmp_path / "snapshots")


def test_any_program_reads_a_checksummed_file(folder):
    """A checksummed file is an ordinary safetensors file; our own readers verify the checksum and keep it to themselves."""
    path = path_of(folder, 20)
    assert all(torch.equal(t, tensors(20)[n]) for n, t in load_file(path).items())
    with safe_open(path, framework="pt") as f:
        assert (
            set(f.metadata()) == {"format", "dedistill.run", "dedistill.step", PREVIOUS, CHECKSUM}
            and f.metadata()[CHECKSUM] != "0" * 64
        )
    found, header = read_tensors(path)
    assert found.keys() == tensors(20).keys() and CHECKSUM not in header
    verify_checksum(path)


def test_the_same_snapshot_has_the_same_bytes(folder, tmp_path):
    """A step that is done again after a resume leaves what was there, so the ones after it stay valid."""
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    write(folder, [50, 200])
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_every_flipped_bit_is_found_by_name(folder, tmp_path):
    """In length, header, checksum and numbers alike, bit by bit of one file; nothing is written."""
    path = path_of(folder, 100)
    good = path.read_bytes()
    for at in range(len(good)):
        raw = bytearray(good)
        raw[at] ^= 1 << (at % 8)
        path.write_bytes(raw)
        with pytest.raises(UserError) as caught:
            average(folder, tmp_path / "out")
        assert path.name in str(caught.value), (at, str(caught.value))
    assert list((tmp_path / "out").glob("*")) == []


def test_a_flipped_bit_is_found_wherever_a_snapshot_is_used(folder):
    """The sweep, merging and export read through the same function."""
    path = path_of(folder, 100)
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 4
    path.write_bytes(raw)
    with pytest.raises(UserError, match=r"step-00000100.*is damaged"):
        read_tensors(path)


@pytest.mark.parametrize("step", STEPS[:-1])
def test_a_missing_one_is_named(step, folder, tmp_path):
    """Each of twenty but the last, of which nothing tells; --skip takes the gap."""
    path_of(folder, step).unlink()
    with pytest.raises(UserError, match=rf"{path_of(folder, step).name}' is missing.*--skip {step}"):
        average(folder, tmp_path / "out")
    average(folder, tmp_path / "out", skip=[step])
    assert len(find_snapshots(folder, [step])) == 19


@pytest.mark.parametrize("step", STEPS)
def test_one_of_another_run_is_named(step, folder, tmp_path):
    """Same names and shapes, same step, other numbers, each of twenty."""
    other = write(tmp_path / "other" / "snapshots", run=1)
    shutil.copy(path_of(other, step), path_of(folder, step))
    with pytest.raises(UserError, match=path_of(folder, step).name):
        average(folder, tmp_path / "out")
    average(folder, tmp_path / "out", skip=[step])


def test_a_damaged_one_can_be_skipped(folder, tmp_path):
    """It is not even opened then; the average says what it was made from."""
    path_of(folder, 100).write_bytes(b"nothing")
    with pytest.raises(UserError, match="step-00000100"):
        average(folder, tmp_path / "out")
    average(folder, tmp_path / "out", skip=[100])
    with safe_open(tmp_path / "out" / "alpha_linear_0.5.safetensors", framework="pt") as f:
        assert (
            "step-00000090" in f.metadata()["dedistill.ema_inputs"]
            and "step-00000100" not in f.metadata()["dedistill.ema_inputs"]
        )


def test_a_renamed_one_is_refused(folder, tmp_path):
    shutil.copy(path_of(folder, 100), path_of(folder, 105))
    with pytest.raises(UserError, match=r"step-00000105.* says that it is of step 100"):
        average(folder, tmp_path / "out")


def test_one_without_a_checksum_is_refused(folder, tmp_path):
    save_file(tensors(100), path_of(folder, 100), metadata={"dedistill.step": "100"})
    with pytest.raises(UserError, match=r"step-00000100.* carries no checksum"):
        average(folder, tmp_path / "out")


def test_an_unknown_step_to_skip_is_refused(folder):
    with pytest.raises(UserError, match=r"--skip 55: .* has no snapshot of this step, and none is missing"):
        find_snapshots(folder, [55])


def test_training_goes_on_over_a_damaged_one(folder, tmp_path):
    """Averaging refuses it afterwards; a run must not end over a file that it does not need."""
    path_of(folder, 200).write_bytes(b"nothing")
    write(folder, [210])
    path_of(folder, 200).write_bytes(path_of(write(tmp_path / "again" / "snapshots"), 200).read_bytes())
    with pytest.raises(UserError, match="step-00000210"):
        average(folder, tmp_path / "out")
    average(folder, tmp_path / "out", skip=[200])


@pytest.mark.parametrize("left", ["more", "less"])
def test_a_file_of_another_length_is_damaged(folder, left):
    path = path_of(folder, 100)
    raw = path.read_bytes()
    path.write_bytes(raw + b"\0" if left == "more" else raw[:-1])
    with pytest.raises(UserError, match="step-00000100"):
        verify_checksum(path)


def test_what_is_not_read_to_its_end_is_not_said_to_be_whole(folder):
    with ChecksummedReader(path_of(folder, 100)) as file, pytest.raises(UserError, match="damaged"):
        file.finish()
