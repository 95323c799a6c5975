"""The table of recipes and cards in docs/performance.md."""

import json
import math
import re

import pytest

from benchmarks import counts
from benchmarks.forecast import MARKS, PAGE, RECIPES, RESULTS, recipe_row, recipe_table
from dedistill.cli.recipes import said_of
from dedistill.forecast.cards import CARDS, FITS, NO, TIGHT, fit, room_on
from dedistill.forecast.meter import Work
from dedistill.recipe.shipped import shipped_recipes

ROWS = {row["recipe"]: row for row in json.loads(RESULTS.read_text())}


def test_the_page_shows_what_was_forecast():
    assert tuple(ROWS) == tuple(RECIPES)
    assert PAGE.read_text().split(MARKS[0])[1].split(MARKS[1])[0].strip() == recipe_table(list(ROWS.values()))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] if name == "flux_lora" else [pytest.mark.slow]) for name in RECIPES]
)
def test_the_forecast_is_current(name):
    """If not: python -m benchmarks.forecast --recipes."""
    assert recipe_row(name) == ROWS[name]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_the_card_that_it_is_made_for(name):
    """By the forecast; and what its first lines say of memory is that."""
    row, needs = ROWS[name], said_of(shipped_recipes()[name])[1]
    assert fit(row["peak_gib"] * 2**30, room_on(RECIPES[name])) == FITS
    assert needs["Memory"].startswith(f"{row['peak_gib']:.1f} GiB at the peak")
    assert re.search(rf"\b{RECIPES[name]} GB card", needs["Hardware"])


def test_there_is_a_recipe_for_every_usual_card():
    assert {12, 16, 24, 48, 80} <= set(RECIPES.values())


def test_kernels_and_bytes_of_a_step_before_and_after():
    """At least 40 % fewer bytes and half of the kernels; each of the four changes has its part in both."""
    before, *alone, now = counts.read()
    assert PAGE.read_text().split(counts.MARKS[0])[1].split(counts.MARKS[1])[0].strip() == counts.table(counts.read())
    assert now.kernels <= 0.5 * before.kernels and now.gigabytes <= 0.6 * before.gigabytes
    assert all(now.kernels < row.kernels < before.kernels and now.gigabytes < row.gigabytes < before.gigabytes for row in alone)


@pytest.mark.long
def test_the_counts_are_current():
    """If not: python -m benchmarks.forecast --counts."""
    assert counts.counted("as it is", []) == counts.read()[-1]


def test_what_fits_a_card():
    """24 GB with 8 % in reserve and a context of .6 GiB: 21.2 GiB fit, 22.9 fit just so."""
    gib = 2**30
    assert [fit(peak * gib, room_on(24)) for peak in (21.2, 21.3, 22.9, 23.0)] == [FITS, TIGHT, TIGHT, NO]


def test_the_least_time_of_a_step():
    """A tera-operation in bf16, one in int8, one in fp8 and a gigabyte moved besides."""
    card = next(card for card in CARDS if card.name == "RTX 4090")
    work = Work(kernels=3, bytes=5 * 10**9, moved=10**9, flops=10**12, integer=10**12, fp8=10**12)
    assert card.seconds(work) == pytest.approx(1 / 165.2 + 1 / 661 + 1 / 330.3 + 1 / 1008)
    assert card.seconds(Work(flops=10**12, copied=10**9)) == pytest.approx(1 / 31.5)  # copied meanwhile
    assert all(card.tops > card.tflops > 50 and card.source for card in CARDS)
    assert [card.name for card in CARDS if not card.does(work)] == ["RTX 3090", "A100 80GB"]
    assert all(card.seconds(work) == math.inf for card in CARDS if not card.does(work))
