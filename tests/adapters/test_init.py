"""How adapters start, measured on the change of weight they stand for, and the check that they really did."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_recipes import adapter_table

from dedistill.adapters.attach import Adapter, check_started, delta, initialise
from dedistill.adapters.targets import Resolved, adaptable, resolve_targets
from dedistill.errors import UserError
from dedistill.flow import keyed
from dedistill.models.model import build_model
from dedistill.models.pixel_flux.family import PixelFlux
from dedistill.models.quantize import dense_weight, prepare_base
from dedistill.recipe.resolve import recipe_of

FAMILY = PixelFlux()
FORMS = {
    "lokr": {"kind": "lokr", "targets": [{"preset": "blocks", "factor": 4}]},
    "lokr-rank": {"kind": "lokr", "targets": [{"preset": "blocks", "factor": 4, "rank": 2}]},
    "lora": {"kind": "lora", "targets": [{"preset": "blocks", "rank": 3}]},
}
INITS = [(f, i) for f in FORMS for i in ("default", "ones", "perturbed_normal") if (f, i) != ("lora", "ones")]
SCALE = 1e-2

every_form = pytest.mark.parametrize("form", FORMS)
every_init = pytest.mark.parametrize(("form", "init"), INITS)


def start(form: str, init: str, *, quant: str = "none", scale: float = SCALE, seed: int = 0, only: int | None = None):
    """An adapter on a tiny network, started; ``only`` the layer of that place where it is given."""
    denoiser = FAMILY.tiny(0).denoiser
    shapes = adaptable(denoiser)
    prepare_base(denoiser, quant, [], "cpu")
    table = adapter_table(FORMS[form]["kind"], *FORMS[form]["targets"])
    targets = resolve_targets(table, shapes, FAMILY.presets(denoiser))
    adapter = Adapter(denoiser, table.kind, targets[slice(only, only and only + 1)])
    for name, module in adapter.by_target.items():
        weight = dense_weight(denoiser.get_submodule(name))
        initialise(module, name, lambda w=weight: w, init=init, scale=scale, seed=seed)
    return SimpleNamespace(denoiser=denoiser, adapter=adapter, layers=adapter.by_target)


def weight_of(own) -> dict[str, torch.Tensor]:
    return {name: dense_weight(own.denoiser.get_submodule(name)) for name in own.layers}


def check(own, init: str, scale: float = SCALE) -> dict[str, float]:
    return check_started(own.layers, lambda name: dense_weight(own.denoiser.get_submodule(name)), init=init, scale=scale)


@pytest.mark.parametrize("quant", ["none", "int8", "int8-quanto"])
def test_full_factors_have_the_statistics_of_their_layer(quant):
    """w1 = 1; mean and deviation of w2 are those of the layer's dequantized weight times the scale.

    Exactly, up to the choice of n or n - 1 under the root of a deviation.
    """
    own = start("lokr", "perturbed_normal", quant=quant)
    for name, weight in weight_of(own).items():
        w2 = own.layers[name].lokr_w2.detach().double()
        assert torch.equal(own.layers[name].lokr_w1, torch.ones(own.layers[name].lokr_w1.shape))
        assert float(w2.std()) == pytest.approx(SCALE * float(weight.double().std()), rel=1 / w2.numel())
        assert float(w2.mean()) == pytest.approx(SCALE * float(weight.double().mean()), abs=1e-5 * float(w2.std()))
        assert float(w2.norm()) < 0.5 * SCALE * float(weight.norm()), "the norm is not that of the weight: std decides"


def test_quantized_statistics_are_not_those_of_the_codes():
    """int8 codes are a hundred times larger than the weights; the delta follows the weights."""
    dense, int8 = start("lokr", "perturbed_normal"), start("lokr", "perturbed_normal", quant="int8")
    for name in dense.layers:
        a, b = (delta(own.layers[name]).detach() for own in (dense, int8))
        assert not torch.equal(a, b) and float((a - b).norm() / a.norm()) < 1e-2


@pytest.mark.parametrize("scale", [1e-4, 1e-3, 1e-1])
@every_form
def test_the_delta_is_a_share_of_the_weight(form, scale):
    """std(delta) = s std(W), hence a ratio of norms of about s, for full, decomposed and LoRA factors alike."""
    own = start(form, "perturbed_normal", scale=scale)
    for name, weight in weight_of(own).items():
        change = delta(own.layers[name]).detach()
        assert float(change.std() / weight.std()) == pytest.approx(scale, rel=1e-2), name
        assert float(change.norm() / weight.norm()) == pytest.approx(scale, rel=1e-2 if form == "lokr" else 0.1), name


def test_the_delta_is_w2_tiled():
    """w1 = 1 makes the delta copies of w2 side by side, so its rank is that of w2."""
    for module in start("lokr", "perturbed_normal").layers.values():
        (rows, columns), w2 = module.lokr_w1.shape, module.lokr_w2
        assert torch.equal(delta(module), w2.repeat(rows, columns))
        assert torch.linalg.matrix_rank(delta(module)) <= min(w2.shape)


@pytest.mark.parametrize("form", ["lokr-rank", "lora"])
def test_decomposed_starts_share_the_size_between_both_factors(form):
    """Both factors are normal and of one size, so that neither of them learns at a rate of its own."""
    for module in start(form, "perturbed_normal").layers.values():
        a, b = (module.lokr_w2_a, module.lokr_w2_b) if form == "lokr-rank" else (module.lora_up.weight, module.lora_down.weight)
        assert float(a.detach().std()) == pytest.approx(float(b.detach().std()), rel=0.5)
        if form == "lokr-rank":
            assert torch.equal(module.lokr_w1, torch.ones_like(module.lokr_w1))


@pytest.mark.parametrize(("form", "init"), [(f, i) for f, i in INITS if i != "perturbed_normal"])
def test_zero_starts_are_exactly_zero(form, init):
    """'default' and 'ones' change nothing at all; 'ones' has w1 = 1, and no start leaves both factors 0."""
    for module in start(form, init).layers.values():
        assert not delta(module).any()
        first = module.lora_down.weight if form == "lora" else module.lokr_w1
        assert first.any() and (init != "ones" or bool((first == 1).all()))
        if form == "lokr-rank":
            assert module.lokr_w2_a.any() and not module.lokr_w2_b.any()


@every_form
def test_default_is_kaiming_uniform(form):
    """U(-1/sqrt(m), 1/sqrt(m)) for m columns, as LyCORIS draws it: within the bound, with its deviation, not its normal."""
    draws = {"lokr": ["lokr_w1"], "lokr-rank": ["lokr_w1", "lokr_w2_a"], "lora": ["lora_down.weight"]}[form]
    for part in draws:
        factors = [m.get_parameter(part).detach() for m in start(form, "default").layers.values()]
        scaled = torch.cat([(p * p.shape[1] ** 0.5).flatten() for p in factors])
        assert 0.97 < float(scaled.abs().max()) <= 1.0
        assert float(scaled.std()) == pytest.approx(3**-0.5, rel=0.1)
        assert abs(float(scaled.mean())) < 0.1


@every_init
def test_a_start_depends_on_seed_and_name_alone(form, init):
    """No order, no neighbour and no global generator has a say; layers and seeds differ."""
    torch.manual_seed(1)
    whole = start(form, init).adapter.tensors()
    torch.manual_seed(2)
    np.random.seed(2)
    again = start(form, init).adapter.tensors()
    assert all(torch.equal(whole[n], again[n]) for n in whole)
    alone = start(form, init, only=5).adapter.tensors()
    assert len(alone) in (3, 4) and all(torch.equal(whole[n], alone[n]) for n in alone)
    if (form, init) != ("lokr", "ones"):  # which draws nothing
        other = start(form, init, seed=1).adapter.tensors()
        assert all(
            not torch.equal(alone[n], other[n]) for n in alone if n.endswith(("_w2", "_a", "down.weight")) and alone[n].any()
        )
        drawn = [delta(m) if init == "perturbed_normal" else next(m.parameters()) for m in start(form, init).layers.values()]
        same = [
            (a, b)
            for i, a in enumerate(drawn)
            for b in drawn[:i]
            if a.shape == b.shape and init != "ones" and torch.equal(a, b)
        ]
        assert not same


@every_init
def test_initialising_leaves_the_global_generators_alone(form, init):
    """The start of an adapter moves nobody else's randomness."""
    own = start(form, init)
    torch.manual_seed(3)
    np.random.seed(3)
    before, numbers = torch.get_rng_state(), np.random.get_state()[1].copy()
    for name, module in own.layers.items():
        initialise(module, name, lambda n=name: weight_of(own)[n], init=init, scale=SCALE, seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numbers)


@every_init
def test_what_started_well_is_reported(form, init):
    """Every layer's relative size is found and returned, also for the starts that are nothing."""
    own = start(form, init)
    found = check(own, init)
    assert found.keys() == own.layers.keys()
    assert list(found.values()) == pytest.approx([SCALE if init == "perturbed_normal" else 0.0] * 20, rel=1e-2, abs=0)


def _skip(module):
    factors = {n: p for n, p in module.named_parameters() if n in ("lokr_w2", "lokr_w2_b", "lora_up.weight")}
    (only,) = factors.values()
    only.data.zero_()


FAULTS = {
    "skipped": (_skip, 0.0),
    "twice as large": (lambda m: next(m.parameters()).data.mul_(2), 2.0),
    "3 % too small": (lambda m: next(m.parameters()).data.mul_(0.97), 0.97),
}


@pytest.mark.parametrize("fault", FAULTS)
@every_form
def test_a_lost_start_is_noticed(form, fault):
    """One layer whose start was lost or has the wrong size stops the run and is named."""
    own = start(form, "perturbed_normal")
    name = list(own.layers)[13]
    break_it, size = FAULTS[fault]
    break_it(own.layers[name])
    with pytest.raises(UserError) as caught:
        check(own, "perturbed_normal")
    assert f"in 1 of 20 layers, e.g. {name}: deviation of the delta is" in str(caught.value)
    found = float(re.search(r"the delta is ([0-9.e-]+) of the weight's, 0.01 was", str(caught.value))[1])
    assert found == pytest.approx(size * SCALE, rel=1e-2)
    assert "'perturbed_normal' did not take effect" in str(caught.value)


@pytest.mark.parametrize("init", ["default", "ones"])
def test_a_start_that_should_be_nothing_but_is_not(init):
    """A perturbed adapter does not pass for one that starts at zero."""
    with pytest.raises(UserError, match=f"'{init}' did not take effect in 20 of 20 layers"):
        check(start("lokr", "perturbed_normal"), init)


def test_the_wrong_scale_is_noticed_everywhere():
    """A scale that differs from the recipe's is an error, not a setting."""
    with pytest.raises(UserError, match="in 20 of 20 layers"):
        check(start("lokr", "perturbed_normal", scale=1e-3), "perturbed_normal", scale=1e-2)


@pytest.mark.parametrize("init", ["perturbed_normal", "default"])
def test_a_start_that_is_not_finite_is_noticed(init):
    """A delta of NaN is not the delta that was asked for."""
    own = start("lokr", init)
    own.layers[next(iter(own.layers))].lokr_w2.data.fill_(torch.nan)
    with pytest.raises(UserError):
        check(own, init)


@every_init
def test_a_layer_of_zeros_starts_and_can_train(form, init):
    """It has no deviation to take a share of, so its delta is 0; at most one factor is, or nothing would ever move."""
    own = start(form, init)
    name = list(own.layers)[3]
    own.denoiser.get_submodule(name).weight.data.zero_()
    module = own.layers[name]
    for factor in module.parameters():
        factor.data.zero_()
    initialise(module, name, lambda: weight_of(own)[name], init=init, scale=SCALE, seed=0)
    assert check(own, init)[name] == 0 and not delta(module).any()
    (delta(module) * keyed.noise(0, "gradient", 0, [0], tuple(delta(module).shape))[0]).sum().backward()
    assert any(p.grad.any() for p in module.parameters())


@pytest.mark.parametrize(("form", "init"), [(f, i) for f, i in INITS if i != "perturbed_normal"])
def test_a_start_without_a_way_to_train_is_noticed(form, init):
    """Delta 0 is right, but with two factors at 0 every gradient is 0 for ever."""
    own = start(form, init)
    name = list(own.layers)[13]
    part = {"lokr": "lokr_w1", "lokr-rank": "lokr_w2_a", "lora": "lora_down.weight"}[form]
    own.layers[name].get_parameter(part).data.zero_()
    found = "in 1 of 20" if (form, init) == ("lokr", "ones") else f"left two factors of 1 of 20 layers at zero, e.g. {name}"
    with pytest.raises(UserError, match=found):
        check(own, init)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_bf16"])
@pytest.mark.parametrize("quant", ["none", "int8"])
def test_the_start_survives_assembly(quant, optimizer):
    """After quantization, attachment and the cast to the trained dtype, the recipe's start is there."""
    sizes = {"layers": 1, "single_layers": 1, "heads": 2, "head_dim": 16, "rope_axes": [4, 6, 6]}
    recipe = recipe_of(
        {
            "run": {"name": "a", "out": "a"},
            "model": {"family": "pixel_flux", "new": {"height": 8, "width": 16, "patch": 4, **sizes}},
            "base": {"quant": quant},
            "adapter": FORMS["lokr"] | {"init": "perturbed_normal", "init_scale": SCALE},
            "data": {"source": "digits"},
            "train": {"steps": 1, "batch": 1, "lr": 1e-3, "optimizer": optimizer}
            | ({"precision": "bf16"} if optimizer == "adamw_bf16" else {}),
        }
    )
    model = build_model(recipe)
    denoiser = model.components.denoiser
    assert len(model.facts["init"]) == 20
    for name, module in model.adapter.by_target.items():
        ratio = float(delta(module).detach().std() / dense_weight(denoiser.get_submodule(name)).std())
        assert ratio == pytest.approx(SCALE, rel=1.5e-2)
        assert model.facts["init"][name] == pytest.approx(ratio, rel=1e-4)
        assert module.lokr_w2.dtype == (torch.bfloat16 if optimizer == "adamw_bf16" else torch.float32)


def test_a_layer_of_one_block_still_starts():
    """Factor 1 makes w1 a single 1 and w2 the whole delta."""
    denoiser = torch.nn.ModuleDict({"linear": torch.nn.Linear(8, 24)})
    module = Adapter(denoiser, "lokr", [Resolved("linear", (24, 8), 1, None, "linear")]).by_target["linear"]
    initialise(module, "linear", lambda: denoiser["linear"].weight, init="perturbed_normal", scale=0.1, seed=0)
    assert module.lokr_w1.shape == (1, 1) and torch.equal(delta(module), module.lokr_w2)
    assert float(delta(module).detach().std() / dense_weight(denoiser["linear"]).std()) == pytest.approx(0.1, rel=1e-5)


@pytest.mark.parametrize("size", [8, 16, 24])
def test_a_small_layer_is_no_failed_start(size):
    """Tiling leaves a deviation as it is, so a layer whose w2 has a few entries has started well, too."""
    denoiser = torch.nn.ModuleDict({"linear": torch.nn.Linear(size, size)})
    adapter = Adapter(denoiser, "lokr", [Resolved("linear", (size, size), 4, None, "linear")])
    own = SimpleNamespace(denoiser=denoiser, layers=adapter.by_target)
    initialise(own.layers["linear"], "linear", lambda: denoiser["linear"].weight, init="perturbed_normal", scale=SCALE, seed=0)
    check(own, "perturbed_normal")
