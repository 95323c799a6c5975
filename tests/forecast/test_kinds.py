"""Every kind of recipe can be forecast, and what only some have is in its category."""

from dataclasses import replace

import pytest

from benchmarks.forecast import SETTINGS, recipe_for
from dedistill.forecast.depth import estimate
from dedistill.forecast.expected import expected
from dedistill.forecast.forecast import Outlooks, beside, card_facts, case_of, changed, other_facts, setting_of
from dedistill.forecast.paper import SAMPLING
from dedistill.forecast.sizes import sizes_of
from dedistill.models.family import DECODING
from dedistill.models.registry import get_family
from dedistill.recipe import load_recipe
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


@pytest.mark.parametrize("objective", ["halve", "features"])
def test_a_teacher_is_the_base_or_a_copy(objective):
    """Beneath an adapter nothing is added; of a whole network there are two, of which one is trained."""
    asked = {"objective": objective, "batch": 1}
    data = {"source": "pairs", "path": "nowhere"} if objective == "features" else {}
    assert forecast(train=asked, data=data)[2]["base"] == forecast()[2]["base"]
    _, count, found = forecast(adapter=None, base={"quant": "none"}, data=data, train={**FP32, **asked})
    assert found["base"] == pytest.approx(found["trained weights"], rel=0.01) and found["base"] >= 4 * count


def test_a_large_validation_is_the_peak():
    assert forecast(validate={"every": 2, "samples": 24})[0] == "validation"
    assert forecast(validate={"every": 2, "samples": 24}, train={"micro_batch": 1})[0] != "validation"


@pytest.mark.parametrize(
    ("side", "phases"), [(64, [DECODING]), (1024, [SAMPLING, DECODING])], ids=["no larger than samples", "larger"]
)
def test_a_card_has_room_for_images_of_previews(image_recipe, side, phases):
    """Large ones are decoded in tiles if need be, which is what a card must have room for."""
    sets = ["preview.every=1", "preview.prompts=['a']", f"sample.height={side}", f"sample.width={side}"]
    previews, none = load_recipe(image_recipe, sets), load_recipe(image_recipe)
    family = get_family("flux")
    cases = [case_of(recipe, family, family.full_size(recipe.model)) for recipe in (previews, none)]
    with_them, without = (Outlooks(case).of(case.recipe, whole=True).estimate for case in cases)
    assert with_them.reserved >= with_them.highest[1].bytes
    added = {phase for phase, _ in with_them.peaks.keys() - without.peaks.keys()}
    assert added == set(phases)
    decoded, alone = with_them.peaks[DECODING, ""], beside(previews, family, [DECODING])[DECODING]
    resident = sum(decoded.by_category.values()) - decoded.by_category["temporary"]
    assert decoded.bytes == resident + alone.least and resident >= without.highest[1].by_category["base"]
    assert (with_them.highest[0][0] in phases) == (side == 1024)
    assert alone.peak == alone.least if side == 64 else alone.peak > 2 * alone.least


@pytest.mark.parametrize(
    "tables",
    [
        {"base": {"quant": "int8-quanto"}},
        {"base": {"quant": "fp8"}},
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


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_products_of_codes_are_counted_as_such(kind):
    """A third of a step's operations or more, in the place of as many in floats; codes take a byte each in any case."""
    found = {}
    for matmul in ("float", kind):
        recipe = recipe_of(LORA | {"base": LORA["base"] | {"quant": kind, "matmul": matmul}})
        family = get_family(recipe.model.family)
        outlooks = Outlooks(case_of(recipe, family, family.full_size(recipe.model)))
        found[matmul] = outlooks.of(recipe)
    plain, coded = found["float"].step, found[kind].step
    assert plain.integer == plain.fp8 == 0 and plain.operations == coded.operations
    assert (coded.integer if kind == "int8" else coded.fp8) > 0.3 * coded.operations
    assert not (coded.fp8 if kind == "int8" else coded.integer)
    base = [o.estimate.highest[1].by_category["base"] for o in found.values()]
    assert base[0] == base[1]
    if kind == "fp8":
        first = next(outlooks.others(recipe, all_of_them=False)).setting
        assert (first.quant, first.matmul) == ("fp8", "fp8")
        other = other_facts([found["fp8"]])[0]["seconds"]
        assert other["A100 80GB"] is None and other["H100"] > 0
        cards = {c["card"]: c["fit"] for c in card_facts(lambda _: found["fp8"])}
        assert (cards["A100 80GB"], cards["H100"]) == ("no", "fits")


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
