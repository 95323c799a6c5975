"""Averages of deltas: exact when dense, nearest when brought back to an adapter, and not the average of factors."""

import numpy as np
import pytest
import torch
from averages import lerp_snapshots
from safetensors.torch import load_file

from dedistill.adapters.delta import weight_change
from dedistill.adapters.naming import layer_of
from dedistill.errors import UserError
from dedistill.flow import keyed
from dedistill.posthoc.average import write_in_space
from dedistill.posthoc.deltas import low_rank_deltas, refactored, write_dense, write_refactored
from dedistill.posthoc.profiles import chain_averages
from dedistill.posthoc.snapshots import find_snapshots, write_snapshot

STEPS = [10, 20, 30, 40]
SHAPES = {
    "lokr": {
        "lycoris_a.lokr_w1": (4, 3),
        "lycoris_a.lokr_w2": (6, 5),
        "lycoris_b.lokr_w1": (2, 2),
        "lycoris_b.lokr_w2": (3, 8),
    },
    "low": {"lycoris_a.lokr_w1": (4, 3), "lycoris_a.lokr_w2_a": (6, 2), "lycoris_a.lokr_w2_b": (2, 5)},
    "lora": {"lycoris_a.lora_up.weight": (12, 2), "lycoris_a.lora_down.weight": (2, 9)},
}


def tensors(kind: str, step: int, noise: float = 0.3) -> dict[str, torch.Tensor]:
    found = {}
    for name, shape in SHAPES[kind].items():
        found[name] = keyed.noise(0, name, 0, [0], shape)[0] + noise * keyed.noise(0, name, 1, [step], shape)[0]
    return found | {f"{layer}.alpha": torch.tensor(3.0) for layer in {layer_of(name) for name in SHAPES[kind]}}


def write(folder, kind: str, noise: float = 0.3):
    for step in STEPS:
        write_snapshot(folder, step, tensors(kind, step, noise), {"format": "pt"})
    return find_snapshots(folder)


def changes(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Layer -> its change of weight."""
    layers: dict[str, dict] = {}
    for name, tensor in found.items():
        layers.setdefault(layer_of(name), {})[name.removeprefix(f"{layer_of(name)}.")] = tensor
    return {layer: weight_change({n: t.double() for n, t in factors.items()}).double() for layer, factors in layers.items()}


def wanted(kind: str, weights: np.ndarray, noise: float = 0.3) -> dict[str, torch.Tensor]:
    each = [changes(tensors(kind, step, noise)) for step in STEPS]
    return {layer: sum(float(w) * c[layer] for w, c in zip(weights, each)) for layer in each[0]}


@pytest.mark.parametrize("kind", SHAPES)
def test_dense_is_the_average_of_the_weights(kind, tmp_path):
    """For every layer and alpha, whatever the factors; scale included."""
    snapshots = write(tmp_path / "snapshots", kind)
    averages = chain_averages([0.2, 0.6, 1.0], len(STEPS), tmp_path / "out")
    write_dense(snapshots, averages)
    for average in averages:
        found, truth = load_file(average.path), wanted(kind, average.weights)
        assert found.keys() == {f"{layer}.diff" for layer in truth}
        for layer, total in truth.items():
            torch.testing.assert_close(found[f"{layer}.diff"].double(), total, rtol=1e-5, atol=1e-5)


def test_averages_of_factors_and_of_deltas_differ_by_the_identity(tmp_path):
    """lerp(dW) - dW(lerp) = alpha (1 - alpha) (A2 - A1) x (B2 - B1), through both writers."""
    snapshots, alpha = write(tmp_path / "snapshots", "lokr")[:2], 0.4
    (factors,) = lerp_snapshots(snapshots, [alpha], tmp_path / "factors")
    (dense,) = averages = chain_averages([alpha], 2, tmp_path / "dense")
    write_dense(snapshots, averages)
    one, two = (tensors("lokr", step) for step in STEPS[:2])
    of_factors, of_deltas = changes(load_file(factors)), load_file(dense.path)
    for layer, found in of_factors.items():
        left, right = (two[f"{layer}.lokr_{w}"] - one[f"{layer}.lokr_{w}"] for w in ("w1", "w2"))
        gap = alpha * (1 - alpha) * torch.kron(left, right).double()
        torch.testing.assert_close(of_deltas[f"{layer}.diff"].double() - found, gap, rtol=0, atol=2e-6)
        assert float(gap.norm()) > 1e-3 * float(found.norm())


@pytest.mark.parametrize("kind", SHAPES)
def test_refactored_has_the_sizes_of_the_snapshots_and_the_error_that_it_states(kind, tmp_path):
    """Loads where a snapshot loads; its distance from the average of the weights is what was said."""
    snapshots = write(tmp_path / "snapshots", kind)
    averages = chain_averages([0.2, 0.6], len(STEPS), tmp_path / "out")
    lost = write_refactored(snapshots, averages)
    for average, missed_by in zip(averages, lost):
        found, truth = load_file(average.path), wanted(kind, average.weights)
        own = tensors(kind, 10)
        assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in own.items()}
        missed = sum(float((changes(found)[layer] - total).square().sum()) for layer, total in truth.items())
        size = sum(float(total.square().sum()) for total in truth.values())
        assert missed_by.error == pytest.approx((missed / size) ** 0.5, rel=1e-3) and missed_by.error > 1e-3


@pytest.mark.parametrize("kind", ["lokr", "lora"])
def test_refactored_is_the_nearest(kind):
    """No other Kronecker product, or product of this rank, is as close (Eckart and Young): perturbed ones are further."""
    factors = {"lokr": ("lokr_w1", "lokr_w2"), "lora": ("lora_up.weight", "lora_down.weight")}[kind]
    each = [tensors(kind, step) for step in STEPS]
    layer = {f: [t[f"lycoris_a.{f}"].double() for t in each] for f in factors}
    weights = np.array([0.1, 0.2, 0.3, 0.4])
    total = low_rank_deltas(layer).dense(weights).double()
    ((new, missed_by),) = refactored(layer, weights[None])
    best = float((weight_change(new).double() - total).square().sum())
    assert best == pytest.approx(missed_by.missed, rel=1e-4)
    for i in range(20):
        moved = {n: t + 0.01 * keyed.noise(0, n, 2, [i], tuple(t.shape))[0] for n, t in new.items()}
        assert float((weight_change(moved).double() - total).square().sum()) > best


@pytest.mark.parametrize("kind", SHAPES)
def test_equal_snapshots_lose_nothing(kind, tmp_path):
    """What is an adapter stays that adapter."""
    snapshots = write(tmp_path / "snapshots", kind, noise=0.0)
    averages = chain_averages([0.3], len(STEPS), tmp_path / "out")
    (missed_by,) = write_refactored(snapshots, averages)
    assert missed_by.error < 1e-6
    found, truth = changes(load_file(averages[0].path)), wanted(kind, averages[0].weights, noise=0.0)
    for layer, total in truth.items():
        torch.testing.assert_close(found[layer], total, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("space", ["delta", "refactored"])
def test_whole_weights_are_sent_to_factors(space, tmp_path):
    for step in STEPS:
        write_snapshot(tmp_path / "s", step, {"block.to_q.weight": torch.ones(3, 3) * step}, {"format": "pt"})
    averages = chain_averages([0.3], len(STEPS), tmp_path / "out")
    with pytest.raises(UserError, match="--space factors"):
        write_in_space(find_snapshots(tmp_path / "s"), averages, space, tmp_path)
    assert list((tmp_path / "out").glob("*")) == []


@pytest.mark.parametrize("space", ["delta", "refactored", "factors"])
def test_damage_leaves_nothing_behind(space, tmp_path):
    """The hash is only known at the end, when almost everything has been written."""
    snapshots = write(tmp_path / "snapshots", "lokr")
    raw = bytearray(snapshots[1].path.read_bytes())
    raw[-1] ^= 1
    snapshots[1].path.write_bytes(raw)
    with pytest.raises(UserError, match=r"step-00000020.* is damaged"):
        write_in_space(snapshots, chain_averages([0.3], len(STEPS), tmp_path / "out"), space, tmp_path)
    assert list((tmp_path / "out").glob("*")) == []
