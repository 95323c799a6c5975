"""The lines of a run that goes on: what they say of speed, memory and the time that is left, and when."""

import json

import pytest
import torch
from tiny_recipes import TEACHER

from dedistill.cli import train
from dedistill.distributed.outside import heartbeat
from dedistill.recipe.resolve import Plan
from dedistill.report.console import data_line
from dedistill.runs import pace as live
from dedistill.runs.pace import Memory, Pace
from dedistill.train import main

PLAN = Plan(steps=1000, batch=8, micro_batch=8, micro_steps=1, samples=8000, checkpoints=1, snapshots=0, validations=0)


class Clock:
    def __init__(self):
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    """Time passes when a test says so."""
    clock = Clock()
    monkeypatch.setattr(live, "time", clock)
    return clock


def rows(clock, pace, seconds):
    """One row per number of seconds."""
    for step, taken in enumerate(seconds, 1):
        clock.now += taken
        pace.took(taken, [])
        yield {"step": step, "loss": 0.5, "grad_norm": 1.0, "lr": 1e-4, "applied": True}


def lines(clock, capsys, seconds) -> list[str]:
    pace = Pace(8, torch.device("cpu"))
    list(live.progress(rows(clock, pace, seconds), 0, PLAN, pace))
    return capsys.readouterr().err.splitlines()


def test_the_first_step_is_told_at_once_and_others_by_time(clock, capsys):
    """Steps of 4 s: after the first a line every fourth step, the first after 15 s."""
    said = lines(clock, capsys, [4.0] * 13)
    assert [line.split()[1] for line in said] == ["1/1000", "5/1000", "9/1000", "13/1000"]
    assert said[0].endswith("4 s/step, 2 samples/s")
    assert said[1].endswith("4 s/step, 2 samples/s, 66 min left")  # 995 steps of 4 s


def test_one_slow_step_does_not_change_the_speed(clock, capsys):
    assert "2 s/step, 4 samples/s" in lines(clock, capsys, [2.0] * 10 + [60.0])[-1]


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (12, "12 s"),
        (99, "99 s"),
        (100, "2 min"),
        (5940, "99 min"),
        (7200, "2 h 0 min"),
        (12345, "3 h 26 min"),
        (190800, "2 d 5 h"),
    ],
)
def test_durations(seconds, said):
    assert live.duration(seconds) == said


def test_useful_work_is_told_only_where_it_is_known():
    """Two samples of 3e12 operations in a step of two seconds; half of what the card can."""
    pace = Pace(2, torch.device("cpu"))
    assert "TFLOP" not in str(pace) and str(pace) == ""
    pace.useful = lambda shape, length: 3e12 if (shape, length) == ((3, 4, 4), 5) else 0.0
    pace.took(2.0, [((2, 3, 4, 4), 5), ((1, 3, 4, 4), None)])
    assert (pace.seconds, pace.tflop_s) == (2.0, 3.0) and "3 useful TFLOP/s" in str(pace) and "%" not in str(pace)
    pace.rate = 6e12
    assert "3 useful TFLOP/s (50% of this card's 6)" in str(pace)
    assert pace.facts()["share_of_rate"] == 0.5


@pytest.mark.parametrize(("peak", "said"), [(19.9, ""), (21.9, ""), (22.1, "+10%"), (15.0, "-25%")])
def test_a_peak_that_was_not_forecast_is_told(monkeypatch, peak, said):
    pace = Pace(8, torch.device("cpu"))
    monkeypatch.setattr(pace, "memory", lambda: Memory(10.0, peak, 24.0))
    assert pace.surprise() == "" and "memory_forecast_gib" not in pace.facts()
    pace.expected = 20.0
    assert said in pace.surprise() and bool(said) == bool(pace.surprise())
    assert pace.facts()["memory_peak_gib"] == peak and pace.facts()["memory_forecast_gib"] == 20.0


def test_what_goes_on_is_named_where_steps_stay_away(capsys, monkeypatch):
    monkeypatch.setattr(live, "EVERY", 0.1)
    monkeypatch.setattr(heartbeat, "phase", "validating 40/128")
    with live._Phases() as phases:
        phases.ended.wait(0.5)
    assert "validating 40/128 ..." in capsys.readouterr().err


def test_the_data_of_a_run_in_a_line():
    facts = {"images": 1200, "held_out_images": 200, "captions": 1300, "crops": 1400, "buckets": 9}
    assert data_line(PLAN, facts) == "1,200 images, 200 held out, 1,300 captions, 1,400 crops, 9 shapes, 8 epochs"
    assert data_line(PLAN, {}) == ""


def test_a_run_tells_its_speed_and_keeps_it(tmp_path, capsys):
    file = tmp_path / "teacher.toml"
    file.write_text(TEACHER.format(out=tmp_path, steps=3))
    assert main([str(file)]) == 0
    said = capsys.readouterr().err
    assert "s/step" in said and "samples/s" in said and "TFLOP" not in said
    why = json.loads((tmp_path / "teacher/plan.json").read_text())["forecast"]
    assert why == {"not_measured": "torch counts no memory on a cpu", "after_steps": 3}
    timings = [json.loads(line) for line in (tmp_path / "teacher/timings.jsonl").read_text().splitlines()]
    assert all(row["step_s"] > 0 and row["samples_s"] == pytest.approx(8 / row["step_s"], rel=0.05) for row in timings)
    assert "step_s" not in (tmp_path / "teacher/metrics.jsonl").read_text()


def test_the_measured_peak_is_written_beside_the_forecast(tmp_path, monkeypatch, capsys):
    """At the third step; a CPU has no such memory, so its numbers are given here."""
    monkeypatch.setattr(Pace, "memory", lambda self: Memory(1.0, 3.0, 24.0))
    monkeypatch.setattr(train, "_expect", lambda trainer, *_: setattr(trainer.pace, "expected", 2.0) or ["expected"])
    for steps in (2, 4):
        file = tmp_path / f"{steps}.toml"
        file.write_text(TEACHER.format(out=tmp_path / str(steps), steps=steps))
        assert main([str(file)]) == 0
    said = capsys.readouterr().err
    assert said.count("note: a step has had 3.0 GiB in use at most, +50% of the 2.0 that were forecast") == 1
    plans = [json.loads((tmp_path / f"{n}/teacher/plan.json").read_text()) for n in (2, 4)]
    assert "forecast" not in plans[0]
    assert plans[1]["forecast"] == {"peak_gib": 2.0, "measured_peak_gib": 3.0, "after_steps": 3} and "effects" in plans[1]
    rows = [json.loads(line) for line in (tmp_path / "4/teacher/timings.jsonl").read_text().splitlines()]
    assert {(row["memory_peak_gib"], row["memory_forecast_gib"]) for row in rows} == {(3.0, 2.0)}
