"""Recipes: what a run should do, read from TOML and checked before anything heavy is imported."""

from dedistill.recipe.load import RESOLVED, RecipeError, load_recipe, to_toml
from dedistill.recipe.schema import Recipe

__all__ = ["RESOLVED", "Recipe", "RecipeError", "load_recipe", "to_toml"]
