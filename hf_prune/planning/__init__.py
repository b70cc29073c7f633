"""From a model and a recipe to a plan. Everything here decides; the model is left as it was."""

from hf_prune.planning.make import Batches, RecipeLike, make_plan


__all__ = ["Batches", "RecipeLike", "make_plan"]
