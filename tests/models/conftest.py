"""Tiny models of every family, each made once."""

from collections.abc import Callable
from copy import deepcopy
from functools import cache

import pytest


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Callable[[str], object]:
    """The components of a family's tiny model of seed 0, by its name: a copy that is the test's own."""
    from test_conformance import TINY

    made = cache(lambda name: TINY[name](0, tmp_path_factory.mktemp(name) / "model"))
    return lambda name: deepcopy(made(name))
