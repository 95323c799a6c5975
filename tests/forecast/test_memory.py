"""Memory that is forecast on tensors without numbers, against what is measured; and deep networks from shallow ones."""

import pytest
from tiny_recipes import adapter_table

from benchmarks.forecast import FAMILIES, SETTINGS, compared, compared_family, recipe_for
from dedistill.forecast.depth import Estimate, estimate
from dedistill.forecast.meter import Event, Peak, Work, reserved
from dedistill.forecast.paper import Case
from dedistill.models.registry import get_family

MIB = 1 << 20


PARTS = {"LoRA", "LoKr, int8", "LoKr, checkpointing, batch of 4", "whole network, bf16"}
"""Settings of which each is in another, beside more."""


@pytest.mark.parametrize("setting", [pytest.param(s, marks=pytest.mark.slow) if s in PARTS else s for s in SETTINGS])
def test_the_peak_of_a_step_is_what_the_profiler_measures(setting):
    """On the CPU, weights and optimizer left out of both: with them the difference would be smaller."""
    row = compared(setting, 128, whole=True)
    assert row.forecast == pytest.approx(row.measured, rel=0.03)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == "SD 1.5, LoRA" else n for n in FAMILIES])
def test_the_peak_of_other_families_is_what_the_profiler_measures(name, tmp_path):
    """U-Nets, whose convolutions have adapters, too, and SD3."""
    row = compared_family(name, tmp_path)
    assert row.forecast == pytest.approx(row.measured, rel=0.03)


def case(**settings) -> Case:
    recipe = recipe_for(64, **settings)
    new = recipe.model.new.model_copy(update={"layers": 4, "single_layers": 4})
    model = recipe.model.model_copy(update={"new": new})
    return Case(recipe.model_copy(update={"model": model}), get_family("pixel_flux"), (16, 32, 32), 48)


NUMBERED = adapter_table("lora", {"pattern": "single_transformer_blocks.2.**", "rank": 4}, {"preset": "attention", "rank": 2})


@pytest.mark.parametrize(
    ("adapter", "checkpointing"),
    [(SETTINGS["LoRA"]["adapter"], False), (SETTINGS["LoKr, int8"]["adapter"], 3), (NUMBERED.model_dump(), True)],
    ids=["all alike", "some checkpointed", "adapters that differ"],
)
def test_a_deep_network_is_forecast_from_shallow_ones(adapter, checkpointing):
    """To the byte, category by category, also where blocks differ in their adapters or in whether they are checkpointed."""
    asked = case(adapter=adapter, quant="int8", checkpointing=checkpointing, batch=2)
    shallow, whole = estimate(asked), estimate(asked, whole=True)
    assert shallow.highest == whole.highest
    assert shallow.work == whole.work


def test_blocks_that_wait_on_the_cpu_take_two_rooms():
    """Of six blocks those numbered 0, 2, 3 and 5 wait: of them one is of the larger kind."""
    peaks = {("backward", ""): Peak(1000, {"base": 600, "optimizer": 400})}
    here = Estimate(peaks, {}, blocks=[90, 90, 40, 40, 40, 40])
    away = here.swapped(4).peaks["backward", ""]
    assert away.bytes == 1000 - (90 + 3 * 40) + 2 * 90 and away.by_category["base"] == 600 - (90 + 3 * 40) + 2 * 90
    passes = (
        Estimate({}, {"forward": Work(kernels=3), "backward": Work(), "optimizer": Work()}, blocks=[50] * 6).swapped(5).work
    )
    assert [(w.kernels, w.copied) for w in passes.values()] == [(3, 150), (0, 150), (0, 0)]


def test_what_the_allocator_takes():
    """Small ones share 2 MiB, middle ones 20 MiB, large ones take their own; what is free again is used again."""
    take = lambda key, size: Event(key, size, "", "")  # noqa: E731
    assert reserved([take(1, 512), take(2, 1 << 19)]) == 2 * MIB
    assert reserved([take(1, 3 * MIB), take(2, 5 * MIB)]) == 20 * MIB
    assert reserved([take(1, 31 * MIB - 5)]) == 32 * MIB
    assert reserved([take(1, 30 * MIB), take(1, -30 * MIB), take(2, 14 * MIB), take(3, 16 * MIB)]) == 30 * MIB
    split = [
        take(1, 30 * MIB),
        take(1, -30 * MIB),
        take(2, 14 * MIB),
        take(3, 12 * MIB),
        take(2, -14 * MIB),
        take(3, -12 * MIB),
    ]
    assert reserved([*split, take(4, 30 * MIB)]) == 30 * MIB
