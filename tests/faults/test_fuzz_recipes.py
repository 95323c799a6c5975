"""Any value for any key of a recipe: a recipe, or one error that says what is wrong. Failing cases are made small."""

import json
import math
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_recipes import ADAPTER, IMAGES

from dedistill.recipe import Recipe, load_recipe
from dedistill.recipe.load import RecipeError
from dedistill.runs.directory import flat

NUMBERS = st.integers() | st.floats() | st.sampled_from([0, 1, -1, 2**63, 1e-320])
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
VALUES = st.recursive(
    NUMBERS | st.booleans() | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


def toml(value: Any) -> str:
    """``value`` as TOML writes it in a line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return "nan" if math.isnan(value) else "inf" if value == math.inf else "-inf" if value == -math.inf else repr(value)
    if isinstance(value, str):
        return json.dumps(value).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{toml(k)} = {toml(v)}' for k, v in value.items())}}}"
    return str(value)


@pytest.mark.parametrize("text", [ADAPTER, IMAGES], ids=["adapter", "images"])
def test_any_value_for_any_key(tmp_path_factory, text):
    file = tmp_path_factory.mktemp("fuzz") / "r.toml"
    file.write_text(text.format(out="runs", base="base", images="images", cache="cache", steps=4))
    keys = sorted(flat(load_recipe(file).resolved()))
    assert len(keys) > 60
    seen = set()

    @settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
    @given(st.sampled_from(keys), VALUES)
    def check(key, value):
        try:
            seen.add(type(load_recipe(file, [f"{key}={toml(value)}"])))
        except RecipeError as e:
            assert e.errors and all(e.errors)
            seen.add(RecipeError)

    check()
    assert seen == {Recipe, RecipeError}
