"""What "auto" becomes: no more blocks are computed again, or wait on the CPU, than a card makes necessary."""

import pytest
from test_memory import case

from benchmarks.forecast import SETTINGS
from dedistill.distributed.world import World
from dedistill.forecast.cards import FITS, SPLIT, fit
from dedistill.forecast.choose import LATER, Choices, settle
from dedistill.forecast.forecast import Outlook
from dedistill.forecast.paper import Case
from dedistill.models.swap import saved
from dedistill.recipe.resolve import settled

BLOCKS = 8
LORA = SETTINGS["LoRA"]["adapter"]


def left_open(**keys) -> Case:
    asked = case(adapter=LORA, quant="int8", batch=2)
    said = {"swap": "auto", "gradient_checkpointing": "auto"} | keys
    base = asked.recipe.base.model_copy(update={"swap": said.pop("swap")})
    recipe = asked.recipe.model_copy(update={"base": base, "train": asked.recipe.train.model_copy(update=said)})
    return Case(recipe, asked.family, asked.image, asked.length)


@pytest.fixture(scope="module")
def found() -> Choices:
    return Choices(left_open())


@pytest.fixture(scope="module")
def every(found) -> Outlook:
    """Of a recipe that says itself that all blocks are computed again."""
    recipe = settled(found.case.recipe, checkpointing=True)
    return found.of(recipe)


@pytest.mark.long
def test_no_more_blocks_are_computed_again_than_must_be(found, every):
    none = found(float("inf"))
    room = SPLIT * (every.peak + 0.5 * (none.peak - every.peak))
    some = found(room, tries=BLOCKS)
    count = int(some.setting.checkpointing)
    assert none.setting.checkpointing is False and BLOCKS > count > 0
    assert fit(some.peak, room) == FITS and not some.setting.swap
    recipe = settled(found.case.recipe, checkpointing=count - 1)
    fewer = found.of(recipe)
    assert fit(fewer.peak, room) != FITS


def test_without_a_look_between_none_and_all_are_all_computed_again(found, every):
    none = found(float("inf"))
    assert none.setting.checkpointing is False
    assert found(SPLIT * none.peak - 1, tries=0).setting.checkpointing is True


def test_blocks_wait_only_where_computing_all_again_is_not_enough(found, every):
    sizes = every.estimate.blocks
    assert found(SPLIT * every.peak + 1).setting.swap == 0
    for count in (5, 6, BLOCKS):
        chosen = found(SPLIT * (every.peak - saved(sizes, count)) + 1)
        assert (chosen.setting.checkpointing, chosen.setting.swap) == (True, count)
        assert chosen.peak == every.peak - saved(sizes, count)
    assert found(0).setting.swap == BLOCKS  # nothing fits, and this takes the least


SAID = pytest.param({"gradient_checkpointing": True}, marks=pytest.mark.slow)


@pytest.mark.parametrize("keys", [SAID, {"swap": 5}, {"compile": "blocks"}], ids=str)
def test_where_all_blocks_are_computed_again_in_any_case(keys):
    """As the recipe says; or since blocks that wait need it; or since nothing is known of what compiled ones keep."""
    chosen = Choices(left_open(**keys))(float(1 << 40)).setting
    assert (chosen.checkpointing, chosen.swap) == (True, keys.get("swap", 0))


def test_a_run_is_told_what_was_chosen(found, every):
    keys, recipe = {"train.gradient_checkpointing", "base.swap"}, found.case.recipe
    on_cpu, chosen = settle(recipe, None, World())
    assert (on_cpu.base.swap, on_cpu.train.gradient_checkpointing) == (0, False) and chosen == dict.fromkeys(keys, 0)
    room = SPLIT * (every.peak - saved(every.estimate.blocks, 6)) + LATER + 2
    small, chosen = settle(recipe, int(room), World())
    assert chosen.keys() == {*keys, "free_gib", "forecast_gib"}
    assert chosen["base.swap"] == small.base.swap > 4 and small.train.gradient_checkpointing is True
    assert settle(small, int(room), World()) == (small, {})
    # of a base that each process holds a part of, none waits
    assert settle(recipe, int(room), World(), in_parts=True)[0].base.swap == 0
