"""`PruningCallback`: for trainers that can't be subclassed."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from hf_prune.errors import RecipeError
from hf_prune.planning import Batches, RecipeLike
from hf_prune.recipe import Recipe
from hf_prune.report import PruningReport
from hf_prune.training.pruner import Pruner


class PruningCallback(TrainerCallback):
    """Prunes on the recipe's schedule from inside any `Trainer`, and shrinks the model when training ends.

    What it can't do, and `PruningTrainer` does: write masks into checkpoints and resume from them; keep a model from
    before the schedule's end from becoming the best; distill; log sparsity (`pruner.scalars()` has it); keep the trained
    masked model on disk if verification fails. After training the trainer's optimizer is stale. docs/training.md says more.

    Args:
        recipe: a `Recipe`, a mapping, or a path to YAML.
        calibration: keyword inputs of the model, for criteria that look at data.

    Raises:
        RecipeError: the recipe can't be accepted.
    """

    def __init__(self, recipe: RecipeLike, calibration: Batches | None = None):
        self.recipe = Recipe.load(recipe)
        self.calibration = calibration
        self.pruner: Pruner | None = None
        self.pruning_report: PruningReport | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.recipe.schedule.shrink == "when_final" and args.world_size > 1:
            raise RecipeError(
                "schedule.shrink: when_final has to make DistributedDataParallel anew, which a callback doesn't get to see; write "
                "shrink: at_end, or use PruningTrainer or PruningMixin"
            )
        self.pruner = Pruner(
            kwargs["model"], kwargs["optimizer"], self.recipe, n_steps=state.max_steps, calibration=self.calibration
        )

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.pruner is not None
        self.pruner.step()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.pruner is not None
        self.pruning_report = self.pruner.finish()
