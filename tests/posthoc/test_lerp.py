"""The LERP chain of snapshots: its weights, its arithmetic, what it reads, writes and refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import dedistill.posthoc.lerp as lerp
from dedistill.errors import UserError
from dedistill.flow import keyed
from dedistill.posthoc.lerp import ALPHAS, chain_weights, describe, find_snapshots, lerp_snapshots, output_name

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
    folder.mkdir(exist_ok=True)
    for step in steps:
        header = {"format": "pt", "dedistill.step": str(step)}
        save_file(tensors(step, dtype), folder / f"step-{step:08d}.safetensors", metadata=header)
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
    """E1, E2, trap 20: the closed form equals the recursion run on unit vectors in float64, and adds up to 1."""
    found = chain_weights(alpha, count)
    wanted = chain(list(torch.eye(count, dtype=torch.float64)), alpha).numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=0)
    assert found.sum() == pytest.approx(1, abs=1e-14) and len(found) == count
    assert found[-1] == (alpha if count > 1 else 1)  # alpha belongs to the new checkpoint


def test_what_an_alpha_amounts_to():
    """E2: alpha .9 is 90 % last, 9 % previous, .9 % before: 1.22 effective samples; .999 is the last snapshot."""
    weights = chain_weights(0.9, 20)
    assert weights[-3:] == pytest.approx([0.009, 0.09, 0.9])
    effective, age = describe(weights, [100 * k for k in range(1, 21)])
    assert effective == pytest.approx(1.22, abs=0.005) and age == pytest.approx(100 / 9, rel=1e-6)
    effective, age = describe(chain_weights(0.999, 20), [100 * k for k in range(1, 21)])
    assert effective == pytest.approx(1, abs=3e-3) and age < 0.2
    assert describe(np.full(4, 0.25), [10, 20, 30, 50])[0] == pytest.approx(4)
    assert describe(np.full(4, 0.25), [10, 20, 30, 50])[1] == pytest.approx((40 + 30 + 20) / 4)


@pytest.mark.parametrize("alpha", [0.0, -0.1, 1.0001, float("nan")])
def test_alpha_out_of_range(alpha, tmp_path):
    """E2: the weight of a checkpoint lies in (0, 1]; nothing is written for another one."""
    folder = write(tmp_path / "snapshots", STEPS[:2])
    with pytest.raises(UserError, match="alpha"):
        lerp_snapshots(find_snapshots(folder), [0.5, alpha], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_steps_are_ordered_as_numbers(tmp_path):
    """E8, trap 20: the order of files, of their creation and of their letters does not matter."""
    steps = [99999999, 100000000, 7, 20, 1000000000]
    for step in steps:
        save_file(tensors(step), tmp_path / f"step-{step:08d}.safetensors")
    for other in ("step-last.safetensors", "step-00000005.safetensors.tmp", "alpha_linear_0.9.safetensors"):
        (tmp_path / other).write_bytes(b"not a snapshot")
    found = find_snapshots(tmp_path)
    assert [s.step for s in found] == sorted(steps)
    assert [s.path.name for s in found] != sorted(s.path.name for s in found), "letters must disagree for this to mean anything"
    (written,) = lerp_snapshots(found, [0.6], tmp_path / "out")
    wanted = chain([tensors(s)["lycoris_a.lokr_w2"] for s in sorted(steps)], 0.6)
    torch.testing.assert_close(load_file(written)["lycoris_a.lokr_w2"], wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("steps", [[], [30]])
def test_fewer_than_two_snapshots(steps, tmp_path):
    """E1: an average needs two; the message says where it looked and how many there are."""
    with pytest.raises(UserError, match=f"'{tmp_path}' holds {len(steps)} snapshots"):
        find_snapshots(write(tmp_path, steps))


def test_averages_equal_the_explicit_chain(tmp_path):
    """E1: every tensor of every alpha to 1e-6; alpha buffers and the layout are copied, the inputs stay as they are."""
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
    """E2: bit for bit, whatever stands before it."""
    folder = write(tmp_path / "snapshots", STEPS, torch.bfloat16)
    (file,) = lerp_snapshots(find_snapshots(folder), [1.0], tmp_path / "out")
    last = tensors(STEPS[-1], torch.bfloat16)
    assert all(torch.equal(t, last[n]) for n, t in load_file(file).items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16, torch.float64])
def test_outputs_keep_their_dtype_and_round_once(dtype, tmp_path):
    """E7: sums are formed wide; each number of the output is the nearest one of its dtype, up to the sum's own error."""
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
    """E7, trap 20: 40 checkpoints of a slow walk at alpha .2; the chain in bf16, by either formula, has three times our error.

    One rounding of such numbers is .0017 of them: ours is that and nothing else.
    """
    value = 1.3 + 0.1 * keyed.noise(0, "start", 0, [0], (64, 64))[0]
    values = []
    for step in range(1, 41):
        value = value + 0.003 * keyed.noise(0, "walk", step, [0], (64, 64))[0]
        values.append(value.bfloat16())
        save_file({"w": values[-1]}, tmp_path / f"step-{step:08d}.safetensors")
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
def test_every_tensor_is_read_once(alphas, tmp_path, monkeypatch):
    """E1: one streaming pass, however many averages are asked for."""
    reads: list[tuple[str, str]] = []

    class Counting:
        """safe_open with a record of the tensors it was asked for."""

        def __init__(self, path, framework):
            self.name, self.file = path.name, safe_open(path, framework=framework)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def get_tensor(self, name):
            reads.append((self.name, name))
            return self.file.get_tensor(name)

        def __getattr__(self, name):
            return getattr(self.file, name)

    folder = write(tmp_path / "snapshots", STEPS)
    monkeypatch.setattr(lerp, "safe_open", Counting)
    lerp_snapshots(find_snapshots(folder), alphas, tmp_path / "out")
    weights = [(f"step-{s:08d}.safetensors", n) for s in STEPS for n in SHAPES]
    assert sorted(r for r in reads if not r[1].endswith(".alpha")) == sorted(weights)
    assert len(reads) <= len(weights) + 2 * len(STEPS)


def test_header_tells_where_it_came_from(tmp_path):
    """E1, E8: the recipe's header of the last snapshot, the alpha, and every input with its weight."""
    folder = write(tmp_path / "snapshots", STEPS)
    (file,) = lerp_snapshots(find_snapshots(folder), [0.9], tmp_path / "out")
    with safe_open(file, framework="pt") as f:
        header = f.metadata()
    assert header["format"] == "pt" and header["dedistill.step"] == "160" and "0.9" in header["dedistill.ema"]
    inputs = json.loads(header["dedistill.ema_inputs"])
    assert [i["file"] for i in inputs] == [f"step-{s:08d}.safetensors" for s in STEPS]
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
    """E8: all names, shapes and dtypes agree, or nothing is written; an earlier average is left as it was."""
    folder, out = write(tmp_path / "snapshots", STEPS), tmp_path / "out"
    (earlier,) = lerp_snapshots(find_snapshots(folder), [0.9], out)
    before = earlier.read_bytes()
    change, tensor = FOREIGN[kind]
    save_file(change(tensors(step)), folder / f"step-{step:08d}.safetensors")
    with pytest.raises(UserError) as caught:
        lerp_snapshots(find_snapshots(folder), [0.9, 0.2], out)
    assert f"step-{step:08d}.safetensors" in str(caught.value) and tensor in str(caught.value)
    assert contents(out) == [earlier.name] and earlier.read_bytes() == before


@pytest.mark.parametrize("damage", ["cut", "empty", "header", "gone"])
def test_a_damaged_snapshot_is_refused_by_name(damage, tmp_path):
    """E8: cut short by a full disk, empty, garbage, or deleted while listed."""
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
    """E8: no half-written average under its name, and no temporary file, when reading fails after writing began."""
    folder, out = write(tmp_path / "snapshots", STEPS), tmp_path / "out"
    original, calls = lerp._averages, []

    def failing(name, files, weights):
        calls.append(name)
        if len(calls) == 4:
            assert any(".tmp-" in p.name for p in out.iterdir())
            raise OSError(5, "Input/output error")
        return original(name, files, weights)

    monkeypatch.setattr(lerp, "_averages", failing)
    with pytest.raises(OSError, match="Input/output"):
        lerp_snapshots(find_snapshots(folder), ALPHAS, out)
    assert contents(out) == []


def test_a_full_disk_names_the_average_and_leaves_nothing_behind(tmp_path, small_disk):
    """T5, E8: an earlier average stays."""
    folder, out = write(tmp_path / "snapshots", STEPS), tmp_path / "out"
    (earlier,) = lerp_snapshots(find_snapshots(folder), [0.9], out)
    before = earlier.read_bytes()
    pattern = rf"cannot write '{out}/alpha_linear_0\.[92]\.safetensors' \([\d,]+ bytes\): File too large"
    with small_disk(3000), pytest.raises(UserError, match=pattern):
        lerp_snapshots(find_snapshots(folder), [0.9, 0.2], out)
    assert contents(out) == [earlier.name] and earlier.read_bytes() == before


def test_factors_are_averaged_not_deltas(tmp_path):
    """E6, trap 20: the gap between the two is alpha (1 - alpha) (A2 - A1) x (B2 - B1), so it is known which one this is."""
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
