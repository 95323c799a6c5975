"""Guiders: neutral settings to the bit, identities, diffusers' formulas, closed forms, and a real network's branches."""

import math

import numpy as np
import pytest
import torch
from closed_form_models import IMAGE, PLANE, closed_form
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from diffusers.guiders.classifier_free_zero_star_guidance import cfg_zero_star_scale
from diffusers.guiders.guider_utils import rescale_noise_cfg

from dedistill.errors import UserError
from dedistill.evaluation.sweep import guiders_at
from dedistill.flow.guidance import CONDITIONAL, GUIDERS, UNCONDITIONAL, Branch, Evaluation, guider_of, parameters
from dedistill.flow.solvers import sigma_grid
from dedistill.models.model import Model, build_model
from dedistill.posthoc.snapshots import write_snapshot
from dedistill.recipe.resolve import recipe_of
from dedistill.sampling.sampler import Sampling, sample, start_noise, trajectories

GRID = sigma_grid(10)
WITH_BLOCKS = {"skip_layers": "skip_layers:blocks=0"}
USUAL = [WITH_BLOCKS.get(name, name) for name in GUIDERS]
NEUTRAL = {
    "interval": "interval:low=0,high=1",
    "rescale": "rescale:phi=0",
    "apg": "apg:eta=1,rms=inf,momentum=0",
    "skip_layers": "skip_layers:blocks=1,scale=0",
}
"""Settings that are plain CFG. The other guiders are plain nowhere, but without guidance at scale 1."""


def velocities(seed: int = 0, shape: tuple[int, ...] = (5, 3, 4, 4), dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Of the prompt and of the negative one, and the noisy sample."""
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(rng.standard_normal(shape)).to(dtype) for _ in range(3)]


def at(noisy: torch.Tensor, i: int = 3, memory: dict | None = None) -> Evaluation:
    return Evaluation(noisy, float(GRID[i]), GRID, i, {} if memory is None else memory)


def guide(name: str, cond: torch.Tensor, uncond: torch.Tensor, where: Evaluation, cfg: float = 4.0) -> torch.Tensor:
    return guider_of(name, cfg).combine({CONDITIONAL: cond, UNCONDITIONAL: uncond}, where)


# --- neutral settings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_settings_are_plain_cfg_to_the_bit(name, solver):
    """Whole paths, at as many calls of the network."""
    images, calls = [], []
    for text in ("cfg", NEUTRAL[name]):
        how = Sampling(solver=solver, steps=6, guidance=guider_of(text, 3.5, 1))
        images.append(sample(closed_form(), ["0", "1"] * 4, start_noise(0, 8, IMAGE), how))
        calls.append(how.nfe())
    assert torch.equal(*images) and calls[0] == calls[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_combinations_are_plain_cfg_to_the_bit(name, dtype):
    cond, uncond, noisy = velocities(dtype=dtype)
    found = guide(NEUTRAL[name], cond, uncond, at(noisy, memory={2: noisy}))
    assert found.dtype == dtype and torch.equal(found, guide("cfg", cond, uncond, at(noisy)))


@pytest.mark.parametrize("name", [name for name in USUAL if not name.startswith("skip_layers")])
def test_scale_one_is_no_guidance_to_the_bit(name):
    """One call in each step, under the name of plain CFG."""
    how = Sampling(steps=5, guidance=guider_of(name, 1.0))
    wanted = sample(closed_form(), ["0", "1"], start_noise(0, 2, IMAGE), Sampling(steps=5))
    assert torch.equal(sample(closed_form(), ["0", "1"], start_noise(0, 2, IMAGE), how), wanted)
    assert how.nfe() == 5 and how.guidance.neutral and how.facts == Sampling(steps=5).facts


def test_what_guides_nowhere_comes_once():
    found = guiders_at((1.0, 3.0), (0, 2), ("cfg", "apg"))
    assert [(g.cfg, g.skip, type(g).__name__) for g in found] == [
        (1.0, 0, "ClassifierFree"),
        *((3.0, skip, name) for name in ("ClassifierFree", "AdaptiveProjected") for skip in (0, 2)),
    ]
    assert len(guiders_at((1.0,), (0, 3), ("skip_layers:blocks=0", "cfg"))) == 3


@pytest.mark.parametrize("name", USUAL)
def test_the_first_steps_are_without(name):
    """Whatever the guider; CFG-Zero* asks nothing in the very first."""
    guider = guider_of(name, 3.0, 4)
    asked = [guider.branches(GRID, i) for i in range(10)]
    zero = parameters(type(guider)).get("zero", 0)
    assert asked[:zero] == [()] * zero
    assert all(UNCONDITIONAL not in branches and CONDITIONAL in branches for branches in asked[zero:4])


# --- formulas --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phi", [0.3, 0.7, 1.0])
def test_rescaled_is_diffusers_formula(phi):
    cond, uncond, noisy = velocities()
    wanted = rescale_noise_cfg(guide("cfg", cond, uncond, at(noisy)), cond, phi)
    torch.testing.assert_close(guide(f"rescale:phi={phi}", cond, uncond, at(noisy)), wanted, rtol=0, atol=1e-5)


def test_fully_rescaled_velocities_deviate_like_the_conditional_one():
    cond, uncond, noisy = velocities(1, dtype=torch.float64)
    found = guide("rescale:phi=1", cond, uncond, at(noisy), cfg=9.0)
    torch.testing.assert_close(found.flatten(1).std(1), cond.flatten(1).std(1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("settings", [(0.0, math.inf, 0.0), (0.3, 0.5, -0.5), (1.0, 0.2, 0.4)], ids=str)
def test_apg_is_the_papers_algorithm_on_data(settings):
    """diffusers' function on predictions of the data, over five steps with its momentum, in the paper's form around cond."""
    eta, rms, momentum = settings
    buffer, memory, cfg = MomentumBuffer(momentum), {}, 6.0
    for i in range(5):
        cond, uncond, noisy = velocities(i, dtype=torch.float64)
        where = at(noisy, i, memory)
        data = [noisy - where.sigma * v for v in (cond, uncond)]
        most = 0.0 if rms == math.inf else rms * math.sqrt(data[0][0].numel())
        wanted = normalized_guidance(*data, cfg - 1, buffer, eta, most, use_original_formulation=True)
        found = guide(f"apg:eta={eta},rms={rms},momentum={momentum}", cond, uncond, where, cfg)
        torch.testing.assert_close(noisy - where.sigma * found, wanted, rtol=0, atol=1e-10)
    assert len(memory) <= 2


def test_both_evaluations_of_a_step_have_the_momentum_of_the_step_before():
    """Heun's second one does not push twice."""
    cond, uncond, noisy = velocities()
    once, twice = {}, {}
    for i, memory in ((2, once), (2, twice), (3, twice), (3, once), (3, twice)):
        last = guide("apg", cond, uncond, at(noisy, i, memory))
    torch.testing.assert_close(last, guide("apg", cond, uncond, at(noisy, 3, once)), rtol=0, atol=0)


def test_apg_moves_the_data_across_what_the_conditional_branch_sees():
    cond, uncond, noisy = velocities(dtype=torch.float64)
    where = at(noisy)
    seen = noisy - where.sigma * cond
    move = noisy - where.sigma * guide("apg:rms=0.1,momentum=0", cond, uncond, where, cfg=7.0) - seen
    assert float((move * seen).flatten(1).sum(1).abs().max()) < 1e-10
    assert float(move.square().flatten(1).mean(1).sqrt().max()) <= 6 * 0.1 + 1e-12


def test_zero_star_is_diffusers_formula_and_blind_to_the_size_of_the_unconditional_velocity():
    cond, uncond, noisy = velocities()
    nearest = cfg_zero_star_scale(cond.flatten(1), uncond.flatten(1)).reshape(-1, 1, 1, 1) * uncond
    found = guide("zero_star", cond, uncond, at(noisy))
    torch.testing.assert_close(found, nearest + 4.0 * (cond - nearest), rtol=0, atol=1e-5)
    torch.testing.assert_close(guide("zero_star", cond, -7 * uncond, at(noisy)), found, rtol=0, atol=1e-5)
    torch.testing.assert_close(guide("zero_star", cond, 0.2 * cond, at(noisy)), cond, rtol=0, atol=1e-5)


def test_zero_star_begins_with_steps_that_cost_nothing():
    """Their velocity is 0: the noise stays, while sigma falls."""
    how = Sampling(steps=8, guidance=guider_of("zero_star:zero=2", 3.0))
    assert how.nfe() == 12
    model, noise = closed_form(), start_noise(0, 4, IMAGE)
    (states,) = trajectories(model, ["0", "1"] * 2, noise, how)
    assert torch.equal(states[2], noise) and not torch.equal(states[3], noise)


def test_interval_is_by_sigma_and_skipped_layers_by_step():
    """Steps at 1, .9 ... .1: those from .6 to .3; and strictly between a tenth and four tenths of the steps."""
    guided = guider_of("interval:low=0.25,high=0.65", 3.0)
    assert [i for i in range(10) if UNCONDITIONAL in guided.branches(GRID, i)] == [4, 5, 6, 7]
    skipping = guider_of("skip_layers:blocks=2+0,start=0.1,stop=0.4", 1.0)
    without = Branch(without=(2, 0))
    assert [i for i in range(10) if without in skipping.branches(GRID, i)] == [2, 3]
    assert Sampling(steps=10, guidance=skipping).nfe() == 12 and not skipping.neutral
    cond, uncond, noisy = velocities()
    found = guider_of("skip_layers:blocks=2+0,scale=2", 4.0).combine(
        {CONDITIONAL: cond, UNCONDITIONAL: uncond, without: noisy}, at(noisy)
    )
    torch.testing.assert_close(found, uncond + 4 * (cond - uncond) + 2 * (cond - noisy), rtol=0, atol=1e-5)


# --- closed forms ----------------------------------------------------------------------------------------------------


def ends(name: str, cfg: float) -> torch.Tensor:
    """Guided samples [256, 2] of the second of two Gaussians in the plane."""
    how = Sampling(steps=32, guidance=guider_of(name, cfg))
    return sample(closed_form(), ["1"] * 256, start_noise(0, 256, IMAGE), how).flatten(1).double()


@pytest.mark.parametrize("name", ["interval", "apg:rms=0.3", "apg:eta=0,momentum=0"])
def test_strong_guidance_leads_less_far_off_the_data(name):
    """At scale 8 plain CFG leaves the Gaussian whose label was asked for; these leave it less."""
    own = PLANE.given(1)
    off = {n: float(((ends(n, 8.0) - own.means) / own.stds).square().mean()) for n in ("cfg", name)}
    assert off[name] < 0.8 * off["cfg"]


# --- a real network --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapted() -> Model:
    """A small network with two blocks and an adapter that is not small."""
    sizes = {"layers": 1, "single_layers": 2, "heads": 2, "head_dim": 16, "rope_axes": [4, 6, 6]}
    base = {"run": {"name": "a", "out": "a"}, "data": {"source": "digits"}, "train": {"steps": 1, "batch": 4, "lr": 1e-3}}
    new = {"height": 8, "width": 16, "patch": 4, "text_dim": 16, "pooled_dim": 16, **sizes}
    table = {"kind": "lora", "targets": [{"preset": "blocks", "rank": 2}]}
    model = build_model(recipe_of({**base, "model": {"family": "pixel_flux", "mask": "bool", "new": new}, "adapter": table}))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.adapter.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape))
    return model


@torch.no_grad()
def velocity(model: Model, branch: Branch) -> torch.Tensor:
    noise = start_noise(0, 2, model.components.sample_shape)
    with model.as_asked(branch):
        return model.velocity(noise, torch.full((2,), 0.6), model.encode(["3 seven", "one"]))


def test_the_weak_branch_is_the_base(adapted):
    """At strength 0 to the bit, between at others; and the model is itself again."""
    whole, weak, half = (velocity(adapted, Branch(adapter=s)) for s in (1.0, 0.0, 0.5))
    assert not torch.allclose(whole, weak, atol=1e-3) and not torch.allclose(half, weak, atol=1e-4)
    assert torch.equal(velocity(adapted, CONDITIONAL), whole)
    adapted.adapter.detach_from_base()
    try:
        torch.testing.assert_close(velocity(adapted, CONDITIONAL), weak, rtol=0, atol=0)
    finally:
        for module in adapted.adapter.by_target.values():
            module.apply_to()
    assert torch.equal(velocity(adapted, CONDITIONAL), whole)


@pytest.mark.parametrize(("weak", "changes"), [(0.0, True), (0.5, True), (1.0, False)])
def test_autoguidance_leads_away_from_the_weak_model(adapted, weak, changes):
    """weak = 1 is no guidance, to the bit; NFE counts both models."""
    noise, prompts = start_noise(0, 2, adapted.components.sample_shape), ["3 seven", "one"]
    how = Sampling(steps=3, guidance=guider_of(f"auto:weak={weak}", 2.0))
    found = sample(adapted, prompts, noise, how)
    assert torch.equal(found, sample(adapted, prompts, noise, Sampling(steps=3))) != changes
    assert how.nfe() == (6 if changes else 3)
    cond, other, _ = velocities()
    guided = guider_of("auto", 3.0).combine({CONDITIONAL: cond, Branch(adapter=0.0): other}, at(cond))
    torch.testing.assert_close(guided, other + 3 * (cond - other), rtol=0, atol=1e-5)


def test_autoguidance_by_an_earlier_snapshot(adapted, tmp_path):
    """Its weights take the place of the model's for that branch alone; a step that was not kept is told by number."""
    adapted.snapshots, own = tmp_path, adapted.tensors()
    whole = velocity(adapted, CONDITIONAL)
    halved = {name: tensor if name.endswith("alpha") else tensor / 2 for name, tensor in own.items()}
    write_snapshot(tmp_path, 40, halved, {})
    weak = velocity(adapted, Branch(step=40))
    assert not torch.allclose(weak, whole, atol=1e-3)
    assert all(torch.equal(tensor, own[name]) for name, tensor in adapted.tensors().items())
    assert torch.equal(velocity(adapted, CONDITIONAL), whole)
    adapted.load_tensors(halved, "here")
    assert torch.equal(velocity(adapted, CONDITIONAL), weak)
    adapted.load_tensors(own, "here")
    with pytest.raises(UserError, match="no snapshot of step 41"):
        velocity(adapted, Branch(step=41))
    write_snapshot(tmp_path, 41, dict(list(halved.items())[1:]), {})
    with pytest.raises(UserError, match="does not fit"):
        velocity(adapted, Branch(step=41))


def test_a_model_without_adapter_has_no_weak_version():
    with pytest.raises(UserError, match=r"'auto'.*--candidates"):
        sample(closed_form(), ["0"], start_noise(0, 1, IMAGE), Sampling(steps=2, guidance=guider_of("auto", 2.0)))


@pytest.mark.parametrize("blocks", [(0,), (1,), (2, 0)])
def test_blocks_that_are_left_out_change_nothing(adapted, blocks):
    """They return what they are given, and are still called, as what waits for them must be."""
    own, called = adapted.family.blocks(adapted.components.denoiser), []

    def nothing(block, args, kwargs, out):
        called.append(out)
        return kwargs["encoder_hidden_states"], kwargs["hidden_states"]

    whole, found = velocity(adapted, CONDITIONAL), velocity(adapted, Branch(without=blocks))
    hooks = [own[n].register_forward_hook(nothing, with_kwargs=True) for n in blocks]
    wanted = [velocity(adapted, branch) for branch in (CONDITIONAL, Branch(without=blocks))]
    for hook in hooks:
        hook.remove()
    assert len(called) == 2 * len(blocks) and torch.equal(found, wanted[0]) and torch.equal(found, wanted[1])
    assert not torch.allclose(found, whole, atol=1e-4) and torch.equal(velocity(adapted, CONDITIONAL), whole)


def test_a_block_that_there_is_not(adapted):
    with pytest.raises(UserError, match="no block 3; the network has 3 blocks"):
        velocity(adapted, Branch(without=(0, 3)))


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", USUAL)
def test_every_guider_says_what_it_is(name):
    guider = guider_of(name, 3.0, 2)
    assert guider.facts["cfg"] == 3.0 and guider.facts["skip"] == 2 and guider.label.startswith("CFG 3, skip 2")
    assert ("method" in guider.facts) == (name != "cfg")
    assert all(parameter in guider.label for parameter in parameters(type(guider)))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("agp", "no guider is called 'agp'; there are cfg, interval"),
        ("", "no guider is called ''"),
        ("cfg:eta=1", "has no parameter 'eta'; it has none"),
        ("apg:etta=1", "has no parameter 'etta'; it has eta, rms, momentum"),
        ("apg:eta=much", "'apg:eta=much': 'much'"),
        ("apg:eta", "'apg:eta': ''"),
        ("apg:momentum=nan", "'nan'"),
        ("zero_star:zero=1.5", "'1.5'"),
        ("zero_star:zero=-1", "zero >= 0"),
        ("interval:low=0.8,high=0.2", "0 <= low <= high <= 1"),
        ("rescale:phi=2", "0 <= phi <= 1"),
        ("apg:rms=0", "rms > 0"),
        ("skip_layers", "blocks=7"),
        ("skip_layers:blocks=7,8", "no parameter '8'"),
        ("skip_layers:blocks=-1", "blocks=7"),
        ("auto:weak=1.5", "0 <= weak <= 1"),
        ("auto:weak=0.5,step=10", "one of weak and step"),
    ],
)
def test_what_is_no_guider_is_refused_in_words(text, words):
    with pytest.raises(ValueError) as told:
        guider_of(text, 3.0)
    assert words in str(told.value)
