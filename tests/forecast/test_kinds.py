"""Every kind of recipe can be forecast, and what only some have is in its category."""

from dataclasses import replace

import pytest

from benchmarks.forecast import SETTINGS, recipe_for
from dedistill.forecast.depth import estimate
from dedistill.forecast.expected import expected
from dedistill.forecast.forecast import Outlooks, case_of, changed, setting_of
from dedistill.forecast.sizes import sizes_of
from dedistill.models.registry import get_family
from dedistill.recipe.resolve import recipe_of

LORA = recipe_for(64, **SETTINGS["LoRA, checkpointing, int8"]).resolved()
FP32 = {"optimizer": "adamw", "precision": "fp32"}
EXAMPLE = {"family": "example", "path": "nowhere", "new": None, "mask": "bool", "text_length": 16}


def forecast(**tables) -> tuple[str, int, dict[str, int]]:
    """(phase of the peak, trained parameters, bytes by category) of a recipe that differs in these tables."""
    data = {key: (None if tables.get(key, "") is None else table) for key, table in LORA.items()}
    data |= {key: {**(LORA[key] or {}), **table} for key, table in tables.items() if table is not None}
    recipe = recipe_of(data)
    family = get_family(recipe.model.family)
    components = family.full_size(recipe.model)
    count = sizes_of(recipe, family, components.denoiser).trained
    found = Outlooks(case_of(recipe, family, components)).of(recipe)
    (phase, _), peak = found.estimate.highest
    return phase, count, peak.by_category


def test_states_and_sums_have_their_sizes():
    """Some small tensors, as the steps that AdamW counts, are rounded up to 512 bytes."""
    _, count, plain = forecast()
    assert plain["optimizer"] == pytest.approx((2 + 2 + 4) * count, rel=0.02) and "averages" not in plain
    averaged = forecast(snapshot={"every": 2, "ema": [0.05, 0.1]})[2]
    assert averaged["averages"] == pytest.approx(2 * 4 * count, rel=0.02)
    exact = forecast(train={**FP32, "exact": True, "batch": 2})[2]
    assert exact["optimizer"] == pytest.approx(2 * 4 * count, rel=0.08) and exact["gradients"] >= 8 * count


def test_a_whole_network_has_no_base():
    _, count, found = forecast(adapter=None, base={"quant": "none"}, train=FP32)
    assert found["optimizer"] == pytest.approx(2 * 4 * count, rel=0.08) and "base" not in found


def test_a_large_validation_is_the_peak():
    assert forecast(validate={"every": 2, "samples": 24})[0] == "validation"
    assert forecast(validate={"every": 2, "samples": 24}, train={"micro_batch": 1})[0] != "validation"


@pytest.mark.parametrize(
    "tables",
    [
        {"base": {"quant": "int8-quanto"}},
        {"train": {"optimizer": "adamw"}},
        {"model": {"mask": "libreflux"}, "train": {"batch": 3}},
        {"adapter": None, "base": {"quant": "none"}, "train": {"optimizer": "adamw", "precision": "bf16"}},
        {"train": {"batch": 8, "micro_batch": 2}, "preview": {"every": 1, "prompts": ["a"]}, "meters": {"every": 1}},
        {"model": EXAMPLE, "base": {"quant": "none"}, "train": FP32},
    ],
    ids=lambda tables: ", ".join(tables),
)
def test_it_can_be_forecast(tables):
    assert forecast(**tables)[1] > 0


def test_useful_work_is_that_of_a_step_without_recomputation():
    """Whatever a recipe recomputes; between the lengths that were measured within a per cent."""
    checkpointed = recipe_of(LORA)
    family = get_family(checkpointed.model.family)
    found = expected(checkpointed, family)
    case = case_of(checkpointed, family, family.full_size(checkpointed.model))
    plain = changed(checkpointed, replace(setting_of(checkpointed), checkpointing=False))
    for length in (48, 24):
        step = estimate(replace(case, recipe=plain, length=length))
        assert found.useful(case.image, length) == pytest.approx(step.total("forward", "backward").operations, rel=0.02)
    peak = max(peak.bytes for (phase, _), peak in estimate(case).peaks.items() if phase != "validation")
    assert found.peak_gib == pytest.approx(peak / 2**30, abs=1e-3)
