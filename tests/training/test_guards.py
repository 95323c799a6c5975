"""The rule by which a step is applied or not, and samples are left out."""

import json
import math

import pytest
import torch

from dedistill.training.guards import LIMIT, RETURNS, SUSPECT, WARM_UP, BadSteps, Guard, Rollback
from dedistill.training.trainer import sigma_bins

SIGMAS = torch.linspace(0.05, 0.95, 8)


def judge(guard: Guard, step: int, *, norm: float = 1.0, losses: torch.Tensor | None = None) -> dict:
    losses = torch.ones(8) if losses is None else losses
    return guard.judge(step, losses, SIGMAS, norm, lambda positions: [f"s{step}.{p}" for p in positions])


def warm(factor: float = 20.0, *, until: int = WARM_UP) -> Guard:
    guard = Guard(factor)
    for step in range(until):
        assert judge(guard, step) == {}
    return guard


def with_loss(position: int, value: float) -> torch.Tensor:
    losses = torch.ones(8)
    losses[position] = value
    return losses


@pytest.mark.parametrize(
    ("factor", "norm", "spike"), [(20.0, 20.1, True), (20.0, 19.9, False), (0.0, 1e9, False), (3.0, 4.0, True)]
)
def test_a_spike_is_measured_against_the_median(factor, norm, spike):
    guard = warm(factor)
    assert ("spike" in judge(guard, WARM_UP, norm=norm)) == spike
    assert (guard.norms[-1] == norm) != spike, "what is not applied is no history"


def test_nothing_is_a_spike_before_enough_is_known():
    assert judge(warm(until=WARM_UP - 1), WARM_UP - 1, norm=1e9) == {}


def test_one_outlier_in_the_history_changes_little():
    """A median, not a mean."""
    guard = warm()
    judge(guard, WARM_UP, norm=19.0)
    assert "spike" in judge(guard, WARM_UP + 1, norm=21.0)


@pytest.mark.parametrize("what", ["loss", "norm"])
def test_what_is_not_finite_is_never_applied(what):
    guard = Guard(0.0)
    wrong = judge(guard, 0, norm=math.nan if what == "norm" else 1.0, losses=with_loss(3, math.inf if what == "loss" else 1.0))
    assert [e["sample"] for e in wrong["not_finite"]] == (["s0.3"] if what == "loss" else [])
    assert guard.norms == []


def test_samples_that_stand_out_three_times_in_a_row_are_left_out():
    guard = warm()
    for step in (40, 41):
        found = judge(guard, step, norm=99.0, losses=with_loss(2, 2 * SUSPECT))["spike"]
        assert [e["sample"] for e in found] == [f"s{step}.2"] and found[0]["sigma"] == pytest.approx(float(SIGMAS[2]))
    with pytest.raises(Rollback) as back:
        judge(guard, 42, norm=math.nan, losses=with_loss(5, math.nan))
    assert (
        back.value.step == 40
        and guard.quarantined_from() == {"s40.2": 40, "s41.2": 40, "s42.5": 40}
        and guard.consecutive_bad == 0
    )


def test_a_good_step_between_clears_the_suspects():
    guard = warm()
    for step in (40, 41, 43, 44):
        assert judge(guard, step, norm=99.0, losses=with_loss(2, 99.0))
        if step == 41:
            assert judge(guard, 42) == {} and guard.suspects == {}
    with pytest.raises(Rollback) as back:
        judge(guard, 45, norm=99.0)
    assert back.value.step == 43 and set(guard.quarantined_from()) == {"s43.2", "s44.2"}


@pytest.mark.parametrize("losses", [torch.ones(8), torch.full((8,), math.nan)])
def test_where_no_sample_stands_out_the_run_stops(losses):
    """A NaN in the gradient alone, or in most of a batch, is not for a sample."""
    guard = warm()
    for step in (40, 41):
        judge(guard, step, norm=math.nan, losses=losses)
    with pytest.raises(BadSteps, match=r"step 43: .* not finite 3 times in a row"):
        judge(guard, 42, norm=math.nan, losses=losses)
    assert guard.quarantine == {}


def test_a_run_does_not_go_back_for_ever():
    """The same steps again and again with new culprits each time: after some times it is not for the samples."""
    guard = warm()
    for turn in range(RETURNS + 1):
        names = lambda positions, turn=turn: [f"turn{turn}.{p}" for p in positions]  # noqa: E731
        with pytest.raises(Rollback if turn < RETURNS else BadSteps, match=None if turn < RETURNS else "quarantined before"):
            for step in (40, 41, 42):
                guard.judge(step, with_loss(0, math.nan), SIGMAS, math.nan, names)
    assert guard.judge(50, torch.ones(8), SIGMAS, 1.0, names) == {}


def test_the_quarantine_does_not_grow_for_ever():
    guard, step = warm(), 100
    with pytest.raises(BadSteps):
        while True:
            try:
                judge(guard, step, norm=99.0, losses=with_loss(0, 99.0))
                step += 1
            except Rollback:
                step += 1  # it gets further every time
    assert len(guard.quarantine) <= LIMIT


def test_a_guard_goes_on_from_its_state():
    """After any number of steps, through JSON, as a checkpoint keeps it."""
    one, rng = Guard(5.0), torch.Generator().manual_seed(0)
    for step in range(120):
        two = Guard(5.0)
        two.load(json.loads(json.dumps(one.state())))
        norm, losses = float(torch.rand((), generator=rng).exp()) * (9 if step % 40 > 36 else 1), torch.rand(8, generator=rng)
        losses[0] *= 9 if step % 40 > 36 else 1
        said = []
        for guard in (one, two):
            try:
                said.append(judge(guard, step, norm=norm, losses=losses))
            except Rollback as back:
                said.append(back.step)
        assert said[0] == said[1] and one.state() == two.state()
    assert one.quarantine, "it was put to the test"


def test_a_sample_that_stands_out_now_and_then_is_left_out():
    """Once per epoch it would cost a step for ever; found for the third time it is quarantined from that step on."""
    guard = warm()
    same = lambda positions: ["bad"] * len(positions)  # noqa: E731
    for step in (40, 60):
        assert guard.judge(step, with_loss(2, math.nan), SIGMAS, math.nan, same)
        assert judge(guard, step + 1) == {}
    with pytest.raises(Rollback) as back:
        guard.judge(80, with_loss(2, math.nan), SIGMAS, math.nan, same)
    assert back.value.step == 80 and guard.quarantined_from() == {"bad": 80} and guard.hits == {} and guard.refused == [40, 60]


def test_more_bad_steps_than_good_ones_stop_the_run():
    """Two of three, which never makes three in a row, and no sample to blame."""
    guard = Guard(0.0)
    with pytest.raises(BadSteps, match=r"not finite, one of 33 bad steps among the last 64"):
        for step in range(200):
            judge(guard, step, norm=1.0 if step % 3 == 0 else math.nan)
    assert step == 49


def test_bins_of_sigma():
    """Means of the losses in equal bins: edges belong to the upper bin, 1 to the last, an empty bin is None."""
    sigmas = torch.tensor([0.0, 0.24, 0.25, 0.3, 0.8, 1.0])
    losses = torch.tensor([1.0, 3.0, 10.0, 20.0, 5.0, 7.0])
    assert sigma_bins(losses, sigmas, 4) == [2.0, 15.0, None, 6.0]
    assert sigma_bins(losses, sigmas, 1) == [pytest.approx(float(losses.mean()))]
    assert sigma_bins(losses[:0], sigmas[:0], 2) == [None, None]
