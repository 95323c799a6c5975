"""The LERP chain of snapshots: its weights, its arithmetic, what it reads, writes and refuses."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from averages import lerp_snapshots
from safetensors import safe_open
from safetensors.torch import load_file

import dedistill.posthoc.snapshots as stream
from dedistill.errors import UserError
from dedistill.flow import keyed
from dedistill.io.safetensors import ChecksummedReader
from dedistill.posthoc.deltas import write_dense
from dedistill.posthoc.profiles import ALPHAS, chain_weights, describe, output_name
from dedistill.posthoc.snapshots import find_snapshots, write_snapshot

SHAPES = {"lycoris_a.lokr_w1": (4, 4), "lycoris_a.lokr_w2": (24, 8), "lycoris_b.lokr_w1": (2, 4), "lycoris_b.lokr_w2": (48, 16)}
STEPS = [30, 60, 90, 120, 150, 160]


def tensors(step: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """What a snapshot holds: a slow common part and a part that differs from step to step."""
    found = {}
    for name, shape in SHAPES.items():
        drift = keyed.noise(0, name, 0, [0], shape)[0] + 0.1 * keyed.noise(0, name, 1, [step], shape)[0]
        found[name] = drift.to(dtype)
    return found | {"lycoris_a.alpha": torch.tensor(1.0), "lycoris_b.alpha": torch.tensor(16.0)}


def write(folder: Path, steps: list[int], dtype: torch.dtype = torch.float32) -> Path:
    for step in steps:
        write_snapshot(folder, step, tensors(step, dtype), {"format": "pt"})
    return folder


def chain(values: list[torch.Tensor], alpha: float) -> torch.Tensor:
    """The recursion itself, in the dtype of ``values``."""
    ema = values[0]
    for value in values[1:]:
        ema = (1 - alpha) * ema + alpha * value
    return ema


def contents(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob("*"))


@pytest.mark.parametrize("count", [1, 2, 5, 20])
@pytest.mark.parametrize("alpha", [*ALPHAS, 1.0, 0.03])
def test_weights_are_those_of_the_chain(alpha, count):
    """The closed form equals the recursion run on unit vectors in float64, and adds up to 1."""
    found = chain_weights(alpha, count)
    wanted = chain(list(torch.eye(count, dtype=torch.float64)), alpha).numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=0)
    assert found.sum() == pytest.approx(1, abs=1e-14) and len(found) == count
    assert found[-1] == (alpha if count > 1 else 1)  # alpha belongs to the new checkpoint


def test_what_an_alpha_amounts_to():
    """Alpha .9 is 90 % last, 9 % previous, .9 % before: 1.22 effective samples; .999 is the last snapshot."""
    weights = chain_weights(0.9, 20)
    assert weights[-3:] == pytest.approx([0.009, 0.09, 0.9])
    steps = [100 * k for k in range(1, 21)]
    spread = describe(weights, steps)
    assert spread.effective == pytest.approx(1.22, abs=0.005) and spread.age == pytest.approx(100 / 9, rel=1e-6)
    spread = describe(chain_weights(0.999, 20), steps)
    assert spread.effective == pytest.approx(1, abs=3e-3) and spread.age < 0.2
    spread = describe(np.full(4, 0.25), [10, 20, 30, 50])
    assert spread.effective == pytest.approx(4) and spread.age == pytest.approx((40 + 30 + 20) / 4)


@pytest.mark.parametrize(
    ("alpha", "sigma"), [(0.2, 0.308), (0.4, 0.186), (0.6, 0.105), (0.8, 0.056), (0.9, 0.035), (0.999, 0.0032)]
)
def test_width_of_a_chain(alpha, sigma):
    """What ten evenly spaced checkpoints come to, comparable with the sigma_rel of a power-law average."""
    assert describe(chain_weights(alpha, 10), [50 * k for k in range(1, 11)]).sigma_rel == pytest.approx(sigma, rel=0.02)


@pytest.mark.parametrize("alpha", [0.0, -0.1, 1.0001, float("nan")])
def test_alpha_out_of_range(alpha, tmp_path):
    """The weight of a checkpoint lies in (0, 1]; nothing is written for another one."""
    folder = write(tmp_path / "snapshots", STEPS[:2])
    with pytest.raises(UserError, match="alpha"):
        lerp_snapshots(find_snapshots(folder), [0.5, alpha], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_steps_are_ordered_as_numbers(tmp_path):
    """The order of files, of their creation and of their letters does not matter."""
    steps = [99999999, 100000000, 7, 20, 1000000000]
    write(tmp_path, sorted(steps))
    for other in ("step-last.safetensors", "step-00000005.safetensors.tmp", "alpha_linear_0.9.safetensors"):
        (tmp_path / other).write_bytes(b"not a snapshot")
    found = find_snapshots(tmp_path)
    assert [s.step for s in found] == sorted(steps)
    assert [s.path.name for s in found] != sorted(s.path.name for s in found), "letters must disagree for this to mean anything"
    (written,) = lerp_snapshots(found, [0.6], tmp_path / "out")
    wanted = chain([tensors(s)["lycoris_a.lokr_w2"] for s in sorted(steps)], 0.6)
    torch.testing.assert_close(load_file(written)["lycoris_a.lokr_w2"], wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("steps", "held"), [([], "0 snapshots"), ([30], "1 snapshot")])
def test_fewer_than_two_snapshots(steps, held, tmp_path):
    """An average needs two; the message says where it looked and how many there are."""
    with pytest.raises(UserError, match=f"'{tmp_path}' holds {held};"):
        find_snapshots(write(tmp_path, steps))


def test_averages_equal_the_explicit_chain(tmp_path):
    """Every tensor of every alpha to 1e-6; alpha buffers and the layout are copied, the inputs stay as they are."""
    folder = write(tmp_path / "snapshots", STEPS)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    files = lerp_snapshots(find_snapshots(folder), ALPHAS, tmp_path / "out")
    assert [f.name for f in files] == [f"alpha_linear_{a}.safetensors" for a in ALPHAS] == [output_name(a) for a in ALPHAS]
    assert contents(tmp_path / "out") == sorted(f.name for f in files)
    for alpha, file in zip(ALPHAS, files):
        found = load_file(file)
        assert found.keys() == tensors(0).keys()
        for name in SHAPES:
            wanted = chain([tensors(s)[name].double() for s in STEPS], alpha)
            assert found[name].dtype == torch.float32 and found[name].shape == SHAPES[name]
            assert float((found[name] - wanted).abs().max()) < 1e-6
        assert float(found["lycoris_a.alpha"]) == 1 and float(found["lycoris_b.alpha"]) == 16
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_alpha_of_one_is_the_last_snapshot(tmp_path):
    """Bit for bit, whatever stands before it."""
    folder = write(tmp_path / "snapshots", STEPS, torch.bfloat16)
    (file,) = lerp_snapshots(find_snapshots(folder), [1.0], tmp_path / "out")
    last = tensors(STEPS[-1], torch.bfloat16)
    assert all(torch.equal(t, last[n]) for n, t in load_file(file).items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16, torch.float64])
def test_outputs_keep_their_dtype_and_round_once(dtype, tmp_path):
    """Sums are formed wide; each number of the output is the nearest one of its dtype, up to the sum's own error."""
    folder = write(tmp_path / "snapshots", STEPS, dtype)
    (file,) = lerp_snapshots(find_snapshots(folder), [0.4], tmp_path / "out")
    found = load_file(file)
    for name in SHAPES:
        exact = chain([tensors(s, dtype)[name].double() for s in STEPS], 0.4)
        assert found[name].dtype == dtype
        half_a_step = torch.finfo(dtype).eps / 2 * exact.abs()
        slack = 1e-6 if dtype != torch.float64 else 1e-15
        assert bool(((found[name].double() - exact).abs() <= half_a_step + slack).all())


def test_bf16_snapshots_lose_a_third_of_what_a_bf16_chain_loses(tmp_path):
    """40 checkpoints of a slow walk at alpha .2; the chain in bf16, by either formula, has three times our error.

    One rounding of such numbers is .0017 of them: ours is that and nothing else.
    """
    value = 1.3 + 0.1 * keyed.noise(0, "start", 0, [0], (64, 64))[0]
    values = []
    for step in range(1, 41):
        value = value + 0.003 * keyed.noise(0, "walk", step, [0], (64, 64))[0]
        values.append(value.bfloat16())
        write_snapshot(tmp_path, step, {"w": values[-1]}, {"format": "pt"})
    (file,) = lerp_snapshots(find_snapshots(tmp_path), [0.2], tmp_path / "out")
    exact, fused = chain([v.double() for v in values], 0.2), values[0]
    for v in values[1:]:
        fused = torch.lerp(fused, v, 0.2)
    ours, plain, lerped = (
        float((x.double() - exact).norm() / exact.norm()) for x in (load_file(file)["w"], chain(values, 0.2), fused)
    )
    once = float((exact.bfloat16().double() - exact).norm() / exact.norm())
    assert ours == pytest.approx(once, rel=0.02) and once < 2e-3
    assert ours <= min(plain, lerped) / 3


@pytest.mark.parametrize("alphas", [ALPHAS[:1], ALPHAS])
def test_every_byte_is_read_once(alphas, tmp_path, monkeypatch):
    """One streaming pass, front to back, however many averages are asked for; the hash is taken on the way."""
    folder = write(tmp_path / "snapshots", STEPS)
    found, read = find_snapshots(folder), {}

    class Counting(ChecksummedReader):
        def _take(self, buffer):
            read[self.path] = read.get(self.path, 0) + len(buffer)
            return super()._take(buffer)

    monkeypatch.setattr(stream, "ChecksummedReader", Counting)
    lerp_snapshots(found, alphas, tmp_path / "out")
    assert read == {s.path: s.path.stat().st_size for s in found}


MEASURED = """
import os, re
from pathlib import Path
import torch
from dedistill.posthoc.profiles import ALPHAS, chain_averages
from dedistill.posthoc.snapshots import find_snapshots
from dedistill.posthoc.snapshots import write_averages

os.fsync = lambda file: None
status = lambda key: int(re.search(rf"{key}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
torch.ones(8, 8) @ torch.ones(8, 8)
found, before = find_snapshots(Path("snapshots")), status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
write_averages(found, chain_averages(ALPHAS[:5], len(found), Path("out")))
print(status("VmHWM") - before)
"""


@pytest.mark.slow
def test_memory_stays_below_one_snapshot(tmp_path, monkeypatch):
    """Five averages of five snapshots of 32 MB, in a process of its own, whose memory grows by less than one of them."""
    monkeypatch.setattr("os.fsync", lambda file: None)  # only to be quick
    big = {f"t{i}": torch.full((1 << 20,), float(i)) for i in range(8)}
    for step in range(1, 6):
        write_snapshot(tmp_path / "snapshots", step, big, {"format": "pt"})
    said = subprocess.run([sys.executable, "-c", MEASURED], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert 0 < int(said) < 32 << 20


def test_header_tells_where_it_came_from(tmp_path):
    """The recipe's header of the last snapshot, the alpha, and every input with its weight."""
    folder = write(tmp_path / "snapshots", STEPS)
    (file,) = lerp_snapshots(find_snapshots(folder), [0.9], tmp_path / "out")
    with safe_open(file, framework="pt") as f:
        header = f.metadata()
    assert header["format"] == "pt" and header["dedistill.step"] == "160" and "0.9" in header["dedistill.ema"]
    inputs = json.loads(header["dedistill.ema_inputs"])
    assert [i["file"] for i in inputs] == [f"snapshots/step-{s:08d}.safetensors" for s in STEPS]
    assert [i["sha256"] for i in inputs] == [s.checksum for s in find_snapshots(folder)]
    assert not any("previous" in key for key in header)
    assert [i["weight"] for i in inputs] == pytest.approx(list(chain_weights(0.9, len(STEPS))), rel=1e-12)


def _without(found: dict) -> dict:
    del found["lycoris_b.lokr_w2"]
    return found


FOREIGN = {
    "missing": (_without, "lycoris_b.lokr_w2"),
    "extra": (lambda t: t | {"lycoris_c.lokr_w1": torch.ones(2, 2)}, "lycoris_c.lokr_w1"),
    "shape": (lambda t: t | {"lycoris_b.lokr_w2": torch.ones(16, 48)}, "lycoris_b.lokr_w2"),
    "dtype": (lambda t: t | {"lycoris_b.lokr_w2": t["lycoris_b.lokr_w2"].half()}, "lycoris_b.lokr_w2"),
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("step", [60, 160])
def test_a_foreign_snapshot_is_refused_by_name(kind, step, tmp_path):
    """All names, shapes and dtypes agree, or nothing is written; an earlier average is left as it was."""
    folder, out = write(tmp_path / "snapshots", STEPS), tmp_path / "out"
    (earlier,) = lerp_snapshots(find_snapshots(folder), [0.9], out)
    before = earlier.read_bytes()
    change, tensor = FOREIGN[kind]
    found = find_snapshots(folder)
    write_snapshot(folder, step, change(tensors(step)), {"format": "pt"})
    with pytest.raises(UserError) as caught:
        lerp_snapshots(found, [0.9, 0.2], out)
    assert f"step-{step:08d}.safetensors" in str(caught.value) and tensor in str(caught.value)
    assert contents(out) == [earlier.name] and earlier.read_bytes() == before


@pytest.mark.parametrize("damage", ["cut", "empty", "header", "gone"])
def test_a_damaged_snapshot_is_refused_by_name(damage, tmp_path):
    """Cut short by a full disk, empty, garbage, or deleted while listed."""
    folder = write(tmp_path / "snapshots", STEPS)
    found, path = find_snapshots(folder), folder / "step-00000090.safetensors"
    raw = path.read_bytes()
    path.write_bytes({"cut": raw[:-100], "empty": b"", "header": b"\xff" * 8 + raw[8:], "gone": b""}[damage])
    if damage == "gone":
        path.unlink()
    with pytest.raises(UserError, match=r"step-00000090\.safetensors"):
        lerp_snapshots(found, ALPHAS, tmp_path / "out")
    assert contents(tmp_path / "out") == []


def test_a_failure_in_the_middle_leaves_nothing_behind(tmp_path, monkeypatch):
    """No half-written average under its name, and no temporary file, when reading fails after writing began."""
    folder, out = write(tmp_path / "snapshots", STEPS), tmp_path / "out"
    found, original, calls = find_snapshots(folder), ChecksummedReader.read_into, []

    def failing(self, part):
        calls.append(self.path)
        if len(calls) == 4 * len(STEPS):
            assert any(".tmp-" in p.name for p in out.iterdir())
            raise OSError(5, "Input/output error")
        return original(self, part)

    monkeypatch.setattr(ChecksummedReader, "read_into", failing)
    with pytest.raises(OSError, match="Input/output"):
        lerp_snapshots(found, ALPHAS, out)
    assert contents(out) == []


def test_a_full_disk_names_the_average_and_leaves_nothing_behind(tmp_path, small_disk):
    """An earlier average stays."""
    folder, out = write(tmp_path / "snapshots", STEPS), tmp_path / "out"
    (earlier,) = lerp_snapshots(find_snapshots(folder), [0.9], out)
    before = earlier.read_bytes()
    pattern = rf"cannot write '{out}/alpha_linear_0\.[92]\.safetensors' \([\d,]+ bytes\): File too large"
    with small_disk(3000), pytest.raises(UserError, match=pattern):
        lerp_snapshots(find_snapshots(folder), [0.9, 0.2], out)
    assert contents(out) == [earlier.name] and earlier.read_bytes() == before


def test_factors_are_averaged_not_deltas(tmp_path):
    """The gap between the two is alpha (1 - alpha) (A2 - A1) x (B2 - B1), so it is known which one this is."""
    folder = write(tmp_path / "snapshots", STEPS[:2])
    alpha = 0.4
    (file,) = lerp_snapshots(find_snapshots(folder), [alpha], tmp_path / "out")
    mean = load_file(file)
    (a1, b1), (a2, b2) = ([tensors(s)[f"lycoris_a.lokr_{w}"].double() for w in ("w1", "w2")] for s in STEPS[:2])
    of_factors = torch.kron(mean["lycoris_a.lokr_w1"].double(), mean["lycoris_a.lokr_w2"].double())
    of_deltas = (1 - alpha) * torch.kron(a1, b1) + alpha * torch.kron(a2, b2)
    gap = alpha * (1 - alpha) * torch.kron(a2 - a1, b2 - b1)
    torch.testing.assert_close(of_deltas - of_factors, gap, rtol=0, atol=1e-6)
    assert float(gap.norm()) > 1e-3 * float(of_deltas.norm())


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("name", ["lycoris_a.lokr_w2", "lycoris_b.lokr_w1"])
@pytest.mark.parametrize("space", ["factors", "dense"])
def test_snapshots_that_are_not_finite_are_refused_by_name(tmp_path, value, name, space):
    folder = write(tmp_path / "snapshots", STEPS[:2])
    spoilt = tensors(STEPS[2])
    spoilt[name].view(-1)[3] = value
    path = write_snapshot(folder, STEPS[2], spoilt, {"format": "pt"})
    with pytest.raises(UserError, match=f"snapshot '{path}': tensor '{name}' is not finite"):
        if space == "factors":
            lerp_snapshots(find_snapshots(folder), [0.5], tmp_path / "out")
        else:
            average = stream.Average(tmp_path / "out" / "x.safetensors", np.full(3, 1 / 3), "x")
            write_dense(find_snapshots(folder), [average])
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize("alpha", [0.5, 0.9])
def test_an_average_made_again_has_the_same_bytes(tmp_path, alpha):
    header = {"format": "pt"} | {f"dedistill.{name}": "x" for name in "zyxabcdefghij"}
    for step in STEPS:
        write_snapshot(tmp_path / "snapshots", step, tensors(step), header)
    made = [lerp_snapshots(find_snapshots(tmp_path / "snapshots"), [alpha], tmp_path / str(i))[0] for i in range(5)]
    assert len({file.read_bytes() for file in made}) == 1
