"""Recipes from text."""

import pytest

from dedistill.recipe import Recipe, RecipeError, load_recipe


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Load a text as ``x.toml``, so that messages start with that name."""
    monkeypatch.chdir(tmp_path)

    def load(text: str, *overrides: str) -> Recipe:
        (tmp_path / "x.toml").write_bytes(text.encode())
        return load_recipe("x.toml", overrides)

    return load


@pytest.fixture
def errors_of(load):
    """The lines of the error that a text must give."""

    def errors_of(text: str, *overrides: str) -> list[str]:
        with pytest.raises(RecipeError) as caught:
            load(text, *overrides)
        assert str(caught.value) == "\n".join(caught.value.errors)
        assert all("\n" not in line for line in caught.value.errors)
        return caught.value.errors

    return errors_of
