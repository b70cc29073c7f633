"""From a model and a recipe to a plan. Everything here decides; the model is left as it was."""

from hf_prune.planning.make import Batches, RecipeLike, make_plan
from hf_prune.planning.step import refuse_without_training


__all__ = ["Batches", "RecipeLike", "make_plan", "refuse_without_training"]
