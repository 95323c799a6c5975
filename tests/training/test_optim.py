"""The optimizers against fp32 AdamW and against the faults of the one they replace; the learning rate."""

import math

import pytest
import torch
from torch import nn

from dedistill.distributed.world import World
from dedistill.errors import UserError
from dedistill.flow import keyed
from dedistill.models.model import build_model
from dedistill.recipe import load_recipe
from dedistill.recipe.resolve import recipe_of
from dedistill.recipe.schema import Recipe
from dedistill.training.engine import Engine, learning_rate
from dedistill.training.optim import (
    load_optimizer_tensors,
    make_optimizer,
    not_finite,
    optimizer_tensors,
)

OPTIMIZERS = {"adamw": torch.float32, "adamw_bf16": torch.bfloat16}
both = pytest.mark.parametrize("optimizer", OPTIMIZERS)


def recipe(optimizer: str = "adamw", **train) -> Recipe:
    return recipe_of(
        {
            "run": {"name": "a", "out": "a"},
            "model": {"family": "pixel_flux", "path": "a"},
            "data": {"source": "digits"},
            "train": {"steps": 100, "batch": 1, "lr": 1e-3, "optimizer": optimizer, **train},
        }
    )


class OriginalAdamWBF16:
    """A model of adamw_bfloat16 as SimpleTuner ships it: its two faults and nothing else.

    The first moment adds the whole gradient to a tenth of itself; the second is kept in bf16 with a beta of .999.
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float, betas: tuple[float, float] = (0.9, 0.999)):
        self.parameters, self.lr, self.betas = parameters, lr, betas
        self.state = {p: {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)} for p in parameters}

    @torch.no_grad()
    def step(self) -> None:
        beta1, beta2 = self.betas
        for p in self.parameters:
            m, v = self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"]
            m.copy_(p.grad + (1 - beta1) * (beta1 * m))
            v.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
            p.addcdiv_(m, v.sqrt() + 1e-6, value=-self.lr)


def ours(p: nn.Parameter, **train):
    return make_optimizer(recipe("adamw_bf16", precision="bf16", **train), [p])


def follow(optimizer, p: nn.Parameter, gradients: list[float], key: str) -> list[float]:
    """The mean of one state after each gradient."""
    found = []
    for g in gradients:
        p.grad = torch.full_like(p, g)
        optimizer.step()
        found.append(float(optimizer.state[p][key].float().mean()))
    return found


def momentum_after_a_pulse(optimizer, p: nn.Parameter, corrected: bool) -> list[float]:
    """First moment after gradients 1, 0, 0; undoing the bias correction where it is stored with it."""
    found = follow(optimizer, p, [1.0, 0.0, 0.0], "exp_avg")
    return [m * (1 - 0.9**t) if corrected else m for t, m in enumerate(found, 1)]


def fall_after_a_drop(optimizer, p: nn.Parameter) -> float:
    """Second moment after 1000 steps with a hundredth of the gradient, relative to before."""
    found = follow(optimizer, p, [1.0] * 200 + [0.01] * 1000, "exp_avg_sq")
    return found[-1] / found[199]


def values_at(optimizer, p: nn.Parameter, steps: list[int]) -> list[float]:
    """Parameter and its compensation, in float32, after some of the steps under noisy gradients of mean 1."""
    found = []
    for step in range(1, max(steps) + 1):
        p.grad = (1 + 0.5 * keyed.noise(0, "gradient", step, [0], tuple(p.shape))[0]).to(p.dtype)
        optimizer.step()
        if step in steps:
            found.append(p.detach().float() + optimizer.state[p].get("kahan_comp", torch.zeros(1)).float())
    return found


@pytest.mark.parametrize("lr", [1e-5, 3e-5, 1e-4])
def test_bf16_tracks_fp32(lr):
    """From w = 1, parameter and compensation together are within 3 % of fp32's way at any time of 1000 steps."""
    steps, start = [30, 100, 300, 1000], torch.ones(64)
    full, low = (nn.Parameter(start.clone().to(d)) for d in (torch.float32, torch.bfloat16))
    wanted = values_at(make_optimizer(recipe(lr=lr), [full]), full, steps)
    found = values_at(ours(low, lr=lr), low, steps)
    far = 1000 * lr * 1.25**-0.5  # mean gradient over its root mean square
    assert float((1 - wanted[-1]).mean()) == pytest.approx(far, rel=0.02), "the way must be long enough to be seen"
    assert float((1 - low.detach().float()).mean()) == pytest.approx(far, rel=0.25), "the parameter itself moves too"
    errors = [float((way - reference).norm() / (reference - start).norm()) for way, reference in zip(found, wanted)]
    assert max(errors) < 0.03, errors


def test_plain_bf16_stands_still():
    """Torch's AdamW at lr 1e-5 leaves bf16 parameters of 1 at exactly 1, where ours moves by a percent."""
    plain, low = (nn.Parameter(torch.ones(64, dtype=torch.bfloat16)) for _ in range(2))
    values_at(torch.optim.AdamW([plain], lr=1e-5, betas=(0.9, 0.99), weight_decay=0), plain, [1000])
    (way,) = values_at(ours(low, lr=1e-5), low, [1000])
    assert torch.equal(plain, torch.ones_like(plain))
    assert float((1 - way).mean()) == pytest.approx(0.01, rel=0.2) and float(low.detach().float().max()) < 1


@both
def test_momentum_answers_a_pulse(optimizer):
    """A unit pulse leaves .1, .09, .081 in the first moment."""
    p = nn.Parameter(torch.ones(8, dtype=OPTIMIZERS[optimizer]))
    made = ours(p) if optimizer == "adamw_bf16" else make_optimizer(recipe(optimizer), [p])
    found = momentum_after_a_pulse(made, p, corrected=optimizer == "adamw_bf16")
    assert found == pytest.approx([0.1, 0.09, 0.081], rel=1e-2)


@both
def test_second_moment_falls_after_the_gradient(optimizer):
    """A hundredth of the gradient is a ten-thousandth of its square, and the state gets there."""
    p = nn.Parameter(torch.ones(8, dtype=OPTIMIZERS[optimizer]))
    fall = fall_after_a_drop(ours(p) if optimizer == "adamw_bf16" else make_optimizer(recipe(optimizer), [p]), p)
    assert 1e-4 <= fall < (1e-3 if optimizer == "adamw_bf16" else 2e-4)


def test_the_checks_fail_for_the_original():
    """Its momentum answers 1, .09, .0081 and its second moment never falls, so these checks can fail."""
    p = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    assert momentum_after_a_pulse(OriginalAdamWBF16([p], 1e-3), p, False) == pytest.approx([1.0, 0.09, 0.0081], rel=1e-2)
    assert fall_after_a_drop(OriginalAdamWBF16([p], 1e-3), p) == 1.0
    wide = nn.Parameter(torch.ones(8))
    assert fall_after_a_drop(OriginalAdamWBF16([wide], 1e-3), wide) < 0.5, "the dtype is what holds it, not the formula"


@pytest.mark.parametrize("beta2", [0.9, 0.95, 0.99])
def test_betas_that_recipes_allow_let_the_second_moment_fall(beta2):
    """Up to the largest second beta that a recipe may ask for in bf16."""
    p = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    assert fall_after_a_drop(ours(p, betas=[0.9, beta2]), p) < 1e-3


@pytest.mark.parametrize(("optimizer", "wanted"), [("adamw", 8), ("adamw_bf16", 8)])
def test_bytes_per_parameter(optimizer, wanted):
    """Two bf16 moments and an fp32 remainder, or two fp32 moments, beside each parameter."""
    p = nn.Parameter(torch.zeros(1000, 100, dtype=OPTIMIZERS[optimizer]))
    made = make_optimizer(recipe(optimizer), [p])
    p.grad = torch.ones_like(p)
    made.step()
    tensors = optimizer_tensors(made, {"w": p})
    assert sum(t.numel() * t.element_size() for t in tensors.values()) / p.numel() == pytest.approx(wanted, abs=1e-3)
    assert made.param_groups[0]["lr"] == 1e-3


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_weight_decay_in_fp32(decay):
    """Decoupled: with gradients of nearly nothing, 1000 steps at lr 1e-3 take e^-.1 of the weight."""
    p = nn.Parameter(torch.ones(8))
    follow(make_optimizer(recipe(weight_decay=decay), [p]), p, [0.0] * 1000, "exp_avg")
    assert float(p.detach().mean()) == pytest.approx(math.exp(-decay), rel=1e-3)


def test_weight_decay_in_bf16():
    """The decay of a recipe is not lost in rounding."""
    p = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    made = ours(p, weight_decay=0.1)
    follow(made, p, [0.0] * 1000, "exp_avg")
    assert float((p.detach().float() + made.state[p]["kahan_comp"].float()).mean()) == pytest.approx(math.exp(-0.1), rel=0.01)


def _parameters(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    return {n: nn.Parameter(keyed.noise(0, n, 0, [0], s)[0].to(dtype)) for n, s in (("a.w1", (3, 4)), ("a.w2", (5,)))}


def _train(optimizer, parameters: dict[str, nn.Parameter], steps: range) -> None:
    for step in steps:
        for name, p in parameters.items():
            p.grad = keyed.noise(0, f"gradient/{name}", step, [0], tuple(p.shape))[0].to(p.dtype)
        optimizer.step()


@both
def test_state_continues_bit_for_bit(optimizer):
    """Tensors out, into fresh objects, and on: the same as never having stopped; without them it is not."""
    settings = recipe(optimizer, weight_decay=0.01)
    whole, stopped = _parameters(OPTIMIZERS[optimizer]), _parameters(OPTIMIZERS[optimizer])
    _train(make_optimizer(settings, whole.values()), whole, range(20))
    first = make_optimizer(settings, stopped.values())
    _train(first, stopped, range(7))
    tensors = {n: t.clone() for n, t in optimizer_tensors(first, stopped).items()}
    saved = {n: t.clone() for n, t in tensors.items()}
    fresh, lost = ({n: nn.Parameter(p.detach().clone()) for n, p in stopped.items()} for _ in range(2))
    _train(first, stopped, range(7, 9))
    second = make_optimizer(settings, fresh.values())
    load_optimizer_tensors(second, fresh, tensors, "x")
    _train(second, fresh, range(7, 20))
    assert all(torch.equal(fresh[n], whole[n]) for n in whole)
    assert all(torch.equal(tensors[n], saved[n]) for n in saved), "they do not follow whom they were loaded into"
    _train(make_optimizer(settings, lost.values()), lost, range(7, 20))
    assert not any(torch.equal(lost[n], whole[n]) for n in whole)


@both
@pytest.mark.parametrize("damage", ["missing", "one key missing", "unknown", "shape", "group", "empty"])
def test_state_that_does_not_fit_is_refused_and_changes_nothing(optimizer, damage):
    """A parameter without its moments would start anew without a word; half a state is never loaded."""
    parameters = _parameters(OPTIMIZERS[optimizer])
    made = make_optimizer(recipe(optimizer), parameters.values())
    _train(made, parameters, range(2))
    tensors = optimizer_tensors(made, parameters)
    if damage == "missing":
        tensors = {n: t for n, t in tensors.items() if not n.startswith("a.w2/")}
    elif damage == "one key missing":
        del tensors["a.w2/exp_avg"]
    elif damage == "unknown":
        tensors["b.w1/exp_avg"] = torch.zeros(2)
    elif damage == "shape":
        tensors["a.w2/exp_avg"] = torch.zeros(6)
    elif damage == "group":
        tensors["group/7/step"] = torch.zeros(())
    else:
        tensors = {"group/0/step": torch.zeros(())}
    named = {
        "missing": r"missing, e\.g\. a\.w2/exp_avg",
        "one key missing": r"1 missing, e\.g\. a\.w2/exp_avg",
        "unknown": r"1 unknown, e\.g\. b\.w1/exp_avg",
        "shape": r"a\.w2/exp_avg is \(6,\), expected \(5,\)",
        "group": r"1 unknown, e\.g\. group/7/step",
        "empty": "holds no parameter",
    }[damage]
    fresh = make_optimizer(recipe(optimizer), parameters.values())
    before = str(fresh.state_dict())
    with pytest.raises(UserError, match=rf"the optimizer state of 'here' does not fit this recipe: .*{named}"):
        load_optimizer_tensors(fresh, parameters, tensors, "here")
    assert str(fresh.state_dict()) == before


def test_step_of_a_fused_optimizer_goes_to_its_device():
    """Torch keeps and loads the step of a fused optimizer on the parameter's device, where the kernel reads it."""
    cpu, far = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4, device="meta"))
    source = make_optimizer(recipe(), [cpu])
    _train(source, {"w": cpu}, range(2))
    ours, reference = (torch.optim.AdamW([far]) for _ in range(2))
    for made in (ours, reference):
        made.param_groups[0]["fused"] = True
    reference.load_state_dict(source.state_dict())
    load_optimizer_tensors(ours, {"w": far}, optimizer_tensors(source, {"w": cpu}), "x")
    wanted = {k: v.device.type for k, v in reference.state[far].items()}
    assert wanted["step"] == "meta"
    assert {k: v.device.type for k, v in ours.state[far].items()} == wanted


@pytest.mark.parametrize(
    ("train", "wanted"),
    [
        ({"schedule": "constant"}, {0: 1.0, 50: 1.0, 99: 1.0}),
        ({"schedule": "constant", "warmup": 4}, {0: 0.25, 1: 0.5, 3: 1.0, 4: 1.0, 99: 1.0}),
        ({"schedule": "linear"}, {0: 1.0, 50: 0.5, 99: 0.01}),
        ({"schedule": "linear", "lr_floor": 0.2}, {0: 1.0, 50: 0.6, 99: 0.208}),
        ({"schedule": "linear", "warmup": 20}, {9: 0.5, 19: 1.0, 20: 1.0, 60: 0.5, 99: 1 / 80}),
        (
            {"schedule": "cosine"},
            {0: 1.0, 25: 0.5 + 0.5 * math.cos(math.pi / 4), 50: 0.5, 75: 0.5 - 0.5 * math.cos(math.pi / 4)},
        ),
        ({"schedule": "cosine", "warmup": 20, "lr_floor": 0.1}, {0: 0.05, 20: 1.0, 60: 0.55, 99: 0.1}),
    ],
)
def test_learning_rate(train, wanted):
    """The documented shapes: linear warm-up, then constant, linear or cosine decay to lr_floor * lr."""
    made = recipe(**train)
    for step, share in wanted.items():
        assert learning_rate(made, step) == pytest.approx(share * 1e-3, rel=4e-3), step


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_learning_rate_is_a_function_of_the_step(schedule):
    """No order of calls matters; the rate never rises after the warm-up and never leaves [floor, lr]."""
    made = recipe(schedule=schedule, warmup=10, **({} if schedule == "constant" else {"lr_floor": 0.05}))
    forward = [learning_rate(made, s) for s in range(100)]
    assert forward == [learning_rate(made, s) for s in reversed(range(100))][::-1]
    assert forward[:10] == sorted(forward[:10]) and forward[9] == 1e-3
    assert forward[10:] == sorted(forward[10:], reverse=True)
    assert min(forward[10:]) >= 0.05e-3 and max(forward) == 1e-3 and min(forward) > 0


@both
def test_no_state_is_a_fresh_start(optimizer):
    """Going back to before the first step forgets moments and counts."""
    used, fresh = _parameters(OPTIMIZERS[optimizer]), _parameters(OPTIMIZERS[optimizer])
    start = {n: p.detach().clone() for n, p in used.items()}
    made = make_optimizer(recipe(optimizer), used.values())
    _train(made, used, range(3))
    load_optimizer_tensors(made, used, {}, "x")
    with torch.no_grad():
        for name, parameter in used.items():
            parameter.copy_(start[name])
    _train(made, used, range(3))
    _train(make_optimizer(recipe(optimizer), fresh.values()), fresh, range(3))
    assert all(torch.equal(used[n], fresh[n]) for n in used)


@pytest.mark.parametrize(("number", "named"), [(1e30, []), (math.nan, ["b/m"]), (-math.inf, ["b/m"])])
def test_moments_are_told_apart_from_what_is_not_finite(number, named):
    """Also such whose squares no float32 holds."""
    tensors = {"a/m": torch.ones(5), "b/m": torch.tensor([0.0, number]), "b/step": torch.tensor(math.nan)}
    assert not_finite({"a/m": tensors["a/m"]}) == []
    assert not_finite({n: t for n, t in tensors.items() if t.dim()}) == named


def test_small_gradients_of_a_bf16_adapter_are_not_rounded_away(adapter_recipe):
    """Of many micro-batches; the optimizer then takes their sum, rounded once, step after step."""
    given = load_recipe(adapter_recipe, ["train.optimizer=adamw_bf16", "train.precision=bf16"])
    engine, model = Engine(given, World()), build_model(given)
    engine.place(model, "cpu")
    for _ in range(2):
        first, second = list(engine.trainable.values())[:2]
        before = first.detach().clone()
        for share in (1.0, *[2.0**-9] * 64):  # in bf16 1 + 2^-9 is 1
            engine.backward(share * first.float().sum(), counts=True)
        norm = engine.finish()
        assert (first.grad == 1.125).all() and (second.grad == 0).all() and first.dtype == torch.bfloat16
        assert float(norm) == pytest.approx(1.125 * first.numel() ** 0.5, rel=1e-6)
        engine.apply(1e-2)
        assert first.grad is None and not torch.equal(first, before)
        assert all(state["exp_avg"].dtype == torch.bfloat16 for state in engine.optimizer.state.values())
