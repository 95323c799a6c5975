"""Solvers and a guider that only this file knows, through everything that makes images."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from closed_form_models import IMAGE, ONE, PLANE, ClosedFormData, closed_form
from torch import Tensor

from dedistill.evaluation.selection import select
from dedistill.evaluation.sweep import Candidate, Grid, read_index, sweep
from dedistill.flow.guidance import CONDITIONAL, GUIDERS, UNCONDITIONAL, Branch, ClassifierFree, Evaluation, guider_of
from dedistill.flow.solvers import SOLVERS, OncePerStep, Velocity, sigma_grid, solve
from dedistill.report.selection import write_selection_page
from dedistill.report.sweep import write_sweep_page
from dedistill.sampling.pairs import make_pairs
from dedistill.sampling.sampler import Sampling, sample, start_noise


class Ralston:
    name = "Ralston"

    @staticmethod
    def evaluations(sigmas: np.ndarray, i: int) -> int:
        return 2

    def step(self, noisy: Tensor, velocity: Velocity, sigmas: np.ndarray, i: int) -> Tensor:
        here, width = float(sigmas[i]), float(sigmas[i + 1] - sigmas[i])
        first = velocity(noisy, here, i)
        return noisy + width / 4 * (first + 3 * velocity(noisy + width * 2 / 3 * first, here + width * 2 / 3, i))


class AdamsBashforth(OncePerStep):
    """Of two steps: it remembers the velocity of the last one."""

    name = "Adams-Bashforth"
    last: Tensor | None = None

    def step(self, noisy: Tensor, velocity: Velocity, sigmas: np.ndarray, i: int) -> Tensor:
        now, width = velocity(noisy, float(sigmas[i]), i), float(sigmas[i + 1] - sigmas[i])
        slope = 0.0 if self.last is None else (now - self.last) / float(sigmas[i] - sigmas[i - 1])
        self.last = now
        return noisy + width * (now + width / 2 * slope)


@dataclass(frozen=True)
class Band:
    """CFG only where low <= sigma <= high."""

    cfg: float
    skip: int = 0
    low: float = 0.0
    high: float = 1.0

    @property
    def neutral(self) -> bool:
        return self.cfg == 1

    @property
    def label(self) -> str:
        return f"CFG {self.cfg:g} for {self.low:g} to {self.high:g}"

    @property
    def facts(self) -> dict[str, float | str]:
        return {"cfg": self.cfg, "skip": 0, "method": f"sigma {self.low:g} to {self.high:g}"}

    def branches(self, sigmas: np.ndarray, i: int) -> tuple[Branch, ...]:
        inside = self.low <= sigmas[i] <= self.high
        return (CONDITIONAL, UNCONDITIONAL) if inside else (CONDITIONAL,)

    def combine(self, outputs: Mapping[Branch, Tensor], at: Evaluation) -> Tensor:
        return ClassifierFree(self.cfg).combine(outputs, at)


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setitem(SOLVERS, "ralston", Ralston)
    monkeypatch.setitem(SOLVERS, "ab2", AdamsBashforth)
    monkeypatch.setitem(GUIDERS, "band", Band)


PROMPTS = ["0", "1"] * 8
MIDDLE = Band(3.0, 0, 0.3, 0.8)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("ralston", 2), ("ab2", 2)])
def test_order_of_convergence(solver, order):
    """Half the step, 1 / 2^order of the error, against the closed form of a Gaussian's paths."""
    noise = torch.linspace(-3, 3, 62, dtype=torch.float64).reshape(31, 2)

    def error(steps: int) -> float:
        *_, end = solve(solver, lambda x, s, _: ONE.velocity(x, s), noise, sigma_grid(steps))
        return float((end - ONE.transport(noise)).abs().mean())

    assert error(128) / error(256) == pytest.approx(2**order, rel=0.05)


@pytest.mark.parametrize("solver", ["heun", "dpmpp_2m", "unipc", "ralston", "ab2"])
def test_every_path_has_a_solver_of_its_own(solver):
    """What one chunk leaves in a solver's memory never reaches the next."""
    noise, how = start_noise(0, 16, IMAGE), Sampling(solver=solver, steps=5, guidance=MIDDLE)
    whole, parts = (sample(closed_form(chunk=n), PROMPTS, noise, how) for n in (16, 5))
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-6)


def test_a_guider_costs_and_gives_what_it_says():
    """On sigmas 1, .75, .5, .25 the middle two are guided; Ralston evaluates each step's branches twice."""
    model, noise, how = closed_form(), start_noise(0, 16, IMAGE), Sampling(solver="ralston", steps=4, guidance=MIDDLE)
    real, calls = model.family.velocity, []
    model.family.velocity = lambda *args: calls.append(1) or real(*args)
    found = sample(model, PROMPTS, noise, how).flatten(1)
    assert len(calls) == how.nfe() == 12
    for label in (0, 1):
        x = noise.flatten(1)[label::2].double()

        def field(x: Tensor, s: float, i: int, label: int = label) -> Tensor:
            return PLANE.guided(x, s, label, 3.0 if i in (1, 2) else 1.0)

        for i, here in enumerate((1, 0.75, 0.5, 0.25)):
            first = field(x, here, i)
            x = x - 0.0625 * (first + 3 * field(x - first / 6, here - 1 / 6, i))
        torch.testing.assert_close(found[label::2].double(), x, rtol=0, atol=1e-5)


def test_a_guider_has_a_name_for_recipes_and_commands():
    assert guider_of("band:low=0.3,high=0.8", 3.0) == MIDDLE


def test_nfe_follows_the_shift():
    """What a guider does by sigma depends on where the steps are."""
    how = Sampling(steps=8, guidance=Band(3.0, 0, 0.0, 0.5))
    assert [how.nfe(), how.nfe(3.0)] == [12, 10]


def test_a_sweep_keeps_ways_of_sampling_apart(tmp_path):
    """Each is a cell with images, cost and place of its own, made once, and has a name on both pages."""
    grid = Grid((ClassifierFree(3.0), MIDDLE), tuple(PROMPTS), (0,), solvers=("euler", "ralston"))
    opened = []
    one = Candidate("one", "w", 4, lambda: opened.append(1) or closed_form())
    scores = sweep([one], grid, tmp_path, title="t", judge=None, say=lambda line: None)
    told = [(cell.get("method"), cell["nfe"]) for cell in scores["cells"]]
    assert told == [(None, 8), ("sigma 0.3 to 0.8", 6), ("Ralston", 16), ("Ralston, sigma 0.3 to 0.8", 12)]
    assert scores["settings"]["solver"] == "Euler, Ralston"
    folders = ["cfg3_skip0", "cfg3_skip0_Ralston", "cfg3_skip0_Ralston-sigma-0.3-to-0.8", "cfg3_skip0_sigma-0.3-to-0.8"]
    assert sorted(p.name for p in (tmp_path / "images/one").iterdir()) == folders
    rows = read_index(tmp_path / "index.json")
    made = sample(closed_form(), PROMPTS, start_noise(0, 16, IMAGE), Sampling(solver="ralston", steps=4, guidance=MIDDLE))
    contrast = [row["contrast"] for row in rows if row.get("method") == "Ralston, sigma 0.3 to 0.8"]
    assert contrast == pytest.approx(made.double().flatten(1).std(1, correction=0).tolist(), abs=1e-6)
    assert sweep([one], grid, tmp_path, title="t", judge=None, say=lambda line: None) == scores and opened == [1]
    assert "one, Ralston, sigma 0.3 to 0.8" in write_sweep_page(tmp_path).read_text()


def test_a_selection_tells_ways_of_sampling_apart(tmp_path):
    cells, rows = [], []
    for solver, correct in (("euler", 0.5), ("ralston", 1.0)):
        how = Sampling(solver=solver, steps=4, guidance=ClassifierFree(3.0))
        cells.append({"candidate": "one", **how.facts, "nfe": how.nfe()})
        rows += [{"candidate": "one", **how.facts, "prompt": f"{i}", "seed": 0, "correct": correct} for i in range(16)]
    number = {"key": "accuracy", "image": "correct", "label": "accuracy", "better": "high", "help": "", "adherence": True}
    found = select({"numbers": [number], "cells": cells}, rows)
    assert found["chosen"] == 1 and [cell["nfe"] for cell in found["cells"]] == [8, 16]
    assert "one, Ralston at CFG 3 in 4 steps" in write_selection_page(tmp_path, found, "t").read_text()


def test_pairs_keep_how_they_were_made(tmp_path):
    settings = {"teacher": "x", "count": 4, "points": 2, "seed": 0, "shard_size": 4}
    how = Sampling(solver="ralston", steps=4, guidance=MIDDLE)
    facts = make_pairs(closed_form(), ClosedFormData(), tmp_path, sampling=how, **settings)
    told = {key: facts[key] for key in ("cfg", "solver", "steps", "method")}
    assert told == {"cfg": 3.0, "solver": "ralston", "steps": 4, "method": "Ralston, sigma 0.3 to 0.8"} and "skip" not in facts
