"""The recipe language: YAML in, checked plain data out."""

from hf_prune.recipe.loading import FILE_NAME, Recipe
from hf_prune.recipe.schema import Schedule, Step


__all__ = ["FILE_NAME", "Recipe", "Schedule", "Step"]
