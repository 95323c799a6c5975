"""Solvers against closed forms, in float64, and against diffusers' schedulers on their own sigmas."""

import math
from typing import get_args

import numpy as np
import pytest
import torch
from closed_form import Mixture
from closed_form_models import IMAGE, PLANE, closed_form
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from dedistill.cli.command import of_sweep
from dedistill.flow.guidance import ClassifierFree
from dedistill.flow.solvers import SOLVERS, sigma_grid, solve
from dedistill.recipe.schema import SolverName
from dedistill.sampling.sampler import Sampling, sample, start_noise

NAMES = list(SOLVERS)
LINE = Mixture.of([0.3, 0.5, 0.2], [[-1.5], [0.4], [2.0]], [[0.3], [0.5], [0.2]], [0, 1, 1])
ONE = Mixture.of([1.0], [[0.3]], [[0.5]], [0])


def end(solver: str, field, start: torch.Tensor, sigmas: np.ndarray) -> torch.Tensor:
    *_, data = solve(solver, lambda x, s, i: field(x, s), start, sigmas)
    return data


def test_recipes_and_commands_know_every_solver():
    assert list(get_args(SolverName)) == NAMES
    assert of_sweep("x", "x", "x", []).parse_args(["r", "--solver", *NAMES]).solver == NAMES


# --- known answers ---------------------------------------------------------------------------------------------------


KNOWN = {
    "euler": (6.843728e-2, 3.535493e-2, 1.799348e-2, 9.080083e-3, 4.561445e-3),
    "heun": (2.596902e-3, 7.501390e-4, 2.000185e-4, 5.155518e-5, 1.308194e-5),
    "dpmpp_2m": (3.057902e-2, 1.015285e-2, 2.496384e-3, 5.920536e-4, 1.427927e-4),
}
"""Errors of 8, 16 ... 128 steps from sigma .95 to .05 for data of mean .3 and deviation .5, by loops written apart from this
package, on Python's own numbers."""


@pytest.mark.parametrize("solver", KNOWN)
def test_errors_between_the_ends_are_the_known_ones(solver):
    start, exact = (ONE.transport(torch.ones(1, 1, dtype=torch.float64), s) for s in (0.95, 0.05))
    errors = [abs(float(end(solver, ONE.velocity, start, np.linspace(0.95, 0.05, 2**k + 1)) - exact)) for k in range(3, 8)]
    assert errors == pytest.approx(KNOWN[solver], rel=1e-6)


def unipc_by_linear_systems(field, z: torch.Tensor, sigmas: np.ndarray) -> torch.Tensor:
    """UniPC-2, B2(h), data prediction, as the paper writes it: weights from a linear system (arXiv 2302.04867, eq. 5, 9)."""

    def log_snr(i):
        return math.log((1 - sigmas[i]) / sigmas[i])

    def weights(h, ratios):
        b = -math.expm1(-h)
        phi = [b / h - 1, (b / h - 1) / -h - 0.5]
        rows = np.vander(np.array(ratios), increasing=True).T
        return np.linalg.solve(rows, np.array([phi[0], 2 * phi[1]])[: len(ratios)] / -b)

    seen, start = [], None
    for i in range(len(sigmas) - 1):
        data = z - sigmas[i] * field(z, sigmas[i])
        if start is not None:
            h = log_snr(i) - log_snr(i - 1)
            scale = (1 - sigmas[i]) * math.expm1(-h)
            differences, ratios = [data - seen[-1]], [1.0]
            if len(seen) > 1:
                ratios.insert(0, (log_snr(i - 2) - log_snr(i - 1)) / h)
                differences.insert(0, (seen[-2] - seen[-1]) / ratios[0])
            w = weights(h, ratios) if len(seen) > 1 else [0.5]
            z = sigmas[i] / sigmas[i - 1] * start - scale * (seen[-1] + sum(a * d for a, d in zip(w, differences)))
        seen, start = [*seen, data], z
        h = log_snr(i + 1) - log_snr(i)
        scale = (1 - sigmas[i + 1]) * math.expm1(-h)
        z = sigmas[i + 1] / sigmas[i] * z - scale * data
        if len(seen) > 1:
            z = z - scale * 0.5 * (seen[-2] - data) / ((log_snr(i - 1) - log_snr(i)) / h)
    return z


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 50])
def test_unipc_has_the_weights_of_its_linear_systems(steps):
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    sigmas = np.linspace(0.98, 0.03, steps + 1) ** 1.3
    wanted = unipc_by_linear_systems(LINE.velocity, noise, sigmas)
    torch.testing.assert_close(end("unipc", LINE.velocity, noise, sigmas), wanted, rtol=0, atol=1e-10)


# --- orders, and what they solve exactly -----------------------------------------------------------------------------


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("dpmpp_2m", 2), ("unipc", 3)])
@pytest.mark.parametrize("mixture", [ONE, LINE], ids=["one", "line"])
def test_order_between_the_ends(mixture, solver, order):
    """Half the step, 1 / 2^order of the error; UniPC's corrector adds an order to its predictor's."""
    noise = torch.linspace(-2.5, 2.5, 41, dtype=torch.float64)[:, None]
    start, exact = (mixture.transport(noise, s) for s in (0.95, 0.05))
    errors = [
        float((end(solver, mixture.velocity, start, np.linspace(0.95, 0.05, n + 1)) - exact).abs().mean()) for n in (128, 256)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize(("solver", "least"), [("euler", 0.9), ("heun", 1.9), ("dpmpp_2m", 1.6), ("unipc", 1.9)])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_order_from_noise_to_data(solver, least, shift):
    """Also where the log SNR is infinite, where three of DPM-Solver++'s steps are Euler's."""
    noise = torch.linspace(-2.5, 2.5, 41, dtype=torch.float64)[:, None]
    exact = LINE.transport(noise)
    errors = [float((end(solver, LINE.velocity, noise, sigma_grid(n, shift)) - exact).abs().mean()) for n in (512, 1024)]
    assert math.log2(errors[0] / errors[1]) > least and errors[1] < (2e-3 if solver == "euler" else 1e-4)


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
@pytest.mark.parametrize("solver", NAMES)
def test_straight_paths_to_one_point_are_solved_exactly(solver, steps):
    """Velocity (noisy - m) / sigma, whose paths are straight and whose data never change: any solver, any number of steps."""
    noise, m = torch.linspace(-3, 3, 12, dtype=torch.float64).reshape(6, 2), torch.tensor([0.7, -2.0]).double()
    found = list(solve(solver, lambda x, s, _: (x - m) / s, noise, sigma_grid(steps, 2.0)))
    for state, sigma in zip(found, sigma_grid(steps, 2.0), strict=True):
        torch.testing.assert_close(state, (1 - sigma) * m + sigma * noise, rtol=0, atol=1e-14)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_constant_velocities_are_solved_exactly(solver):
    noise, v = torch.zeros(3, 2, dtype=torch.float64), torch.tensor([1.0, -3.0]).double()
    torch.testing.assert_close(end(solver, lambda x, s: v, noise, sigma_grid(5)), -v.expand(3, 2), rtol=0, atol=1e-14)


def test_heun_is_exact_for_velocities_linear_in_sigma():
    """The trapezoidal rule, up to its last step, which is Euler's."""
    *_, before, last = solve("heun", lambda x, s, _: 2 * s + 0 * x, torch.ones(1, 1).double(), sigma_grid(8))
    assert float(before) == pytest.approx(1 / 64, abs=1e-15) and float(last) == pytest.approx(1 / 64 - 1 / 32, abs=1e-15)


@pytest.mark.parametrize("solver", NAMES)
def test_one_step_from_noise_gives_the_mean(solver):
    """Which is all that pure noise says of the data."""
    found = end(solver, ONE.velocity, torch.tensor([[1.0], [-2.0]]).double(), sigma_grid(1))
    torch.testing.assert_close(found, torch.full((2, 1), 0.3, dtype=torch.float64), rtol=0, atol=1e-15)


# --- diffusers -------------------------------------------------------------------------------------------------------


MULTISTEP = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "solver_order": 2}
SCHEDULERS = {
    "euler": lambda shift: FlowMatchEulerDiscreteScheduler(shift=shift),
    # it divides float32's rounding by sigma, whose least is one over the number of timesteps
    "heun": lambda shift: FlowMatchHeunDiscreteScheduler(num_train_timesteps=20, shift=shift),
    "dpmpp_2m": lambda shift: DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", flow_shift=shift, **MULTISTEP),
    "unipc": lambda shift: UniPCMultistepScheduler(solver_type="bh2", flow_shift=shift, **MULTISTEP),
}


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 8, 20])
@pytest.mark.parametrize("solver", NAMES)
def test_states_equal_those_of_diffusers(solver, steps, shift):
    """On the sigmas that its scheduler chooses, from the same noise, to float32."""
    scheduler = SCHEDULERS[solver](shift)
    scheduler.set_timesteps(steps)
    every = [float(s) for s in scheduler.sigmas]
    asked = every[:1] + every[1:-1:2] + every[-1:] if solver == "heun" else every  # it lists each inner sigma twice
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal((7, 2))).float()
    theirs = noise
    for place, t in enumerate(scheduler.timesteps):
        sigma = every[place + (solver == "heun" and place % 2)]
        theirs = scheduler.step(PLANE.velocity(theirs.double(), sigma).float(), t, theirs, return_dict=False)[0]
    ours = end(solver, PLANE.velocity, noise.double(), np.array(asked))
    torch.testing.assert_close(theirs.double(), ours, rtol=0, atol=1e-6)


# --- what they cost --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skip", [0, 3])
@pytest.mark.parametrize(("solver", "calls"), [("euler", 8), ("heun", 15), ("dpmpp_2m", 8), ("unipc", 8)])
def test_calls_of_the_network_are_counted(solver, calls, skip):
    """8 steps with both branches, or only one in the first three; Heun's last step asks once."""
    model, how = closed_form(), Sampling(solver=solver, steps=8, guidance=ClassifierFree(3.0, skip))
    real, asked = model.family.velocity, []
    model.family.velocity = lambda *args: asked.append(1) or real(*args)
    sample(model, ["0", "1"], start_noise(0, 2, IMAGE), how)
    assert len(asked) == how.nfe() == 2 * calls - skip * (2 if solver == "heun" else 1)


@pytest.mark.parametrize("solver", NAMES)
def test_float32_follows_float64(solver):
    """With a velocity that knows no sigma above 1 or at 0."""

    def velocity(x, s):
        assert 0 < s <= 1
        return PLANE.velocity(x.double(), s).to(x.dtype)

    noise = torch.linspace(-2, 2, 24).reshape(12, 2)
    found = end(solver, velocity, noise, sigma_grid(16, 3.0))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), end(solver, velocity, noise.double(), sigma_grid(16, 3.0)), rtol=0, atol=2e-6)
