"""`make_plan`: each step of a recipe in turn, on what those before it left."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.apply.masks import masks_of
from hf_prune.calibration.batches import shortfall
from hf_prune.calibration.memory import give_back
from hf_prune.calibration.self_generated import self_generated
from hf_prune.errors import CalibrationError
from hf_prune.plan import KeepMasks, PruningPlan, made_for
from hf_prune.planning.repair import Wanted, repair
from hf_prune.planning.step import StepPlanner, reads_data, refuse_without_training
from hf_prune.recipe import Recipe
from hf_prune.structure import ModelStructure, inspect_model


RecipeLike = Recipe | Mapping[str, Any] | str | Path
Batches = Iterable[Mapping[str, Any]]


def make_plan(
    model: nn.Module,
    recipe: RecipeLike,
    *,
    calibration: Batches | None = None,
    progress: float | Sequence[float] = 1.0,
    previous: PruningPlan | None = None,
    movement: Mapping[str, Tensor] | None = None,
) -> PruningPlan:
    """Decide what leaves `model` by `recipe`. The model is left as it was.

    Args:
        model: any model with sites for the recipe's targets; masks that it has already stay.
        recipe: a `Recipe`, a mapping, or a path to YAML.
        calibration: keyword inputs of the model, batch first; needed by criteria that look at data.
        progress: how much of the final sparsity to reach, in [0, 1]; one number, or one a step of the recipe.
        previous: the plan of the update before: what left by it stays out, and its base counts as the beginning.
        movement: by site key, what training gathered for criteria that score it; None where nothing trains.

    Returns:
        The plan; equal inputs give an equal plan, on one process or many.

    Raises:
        RecipeError: the recipe can't be met on this model.
        CalibrationError: a criterion lacks the data or labels that it needs.
        UnsupportedModelError: the model has no unit of a target, with the reason.
    """
    recipe = Recipe.load(recipe)
    if movement is None:
        refuse_without_training(recipe)
    structure = inspect_model(model)
    progresses = list(progress) if isinstance(progress, Sequence) else [progress] * len(recipe.prune)
    asked, given = recipe.calibration, list(calibration) if calibration is not None else None
    looks = any(reads_data(step) for step, reached in zip(recipe.prune, progresses, strict=True) if reached > 0)
    batches = given
    if looks and asked.self_generated:
        written = self_generated(model, asked.self_generated, asked.length, asked.batch_size, recipe.seed)
        batches = [*(given or []), *written]
    plan = PruningPlan(
        steps=[],
        base=previous.base if previous else masks_of(model),
        recipe=recipe.to_dict(),
        progress=max(progresses),
        model=made_for(structure),
        n_near_ties=previous.n_near_ties if previous else 0,  # the cut of an earlier update may have fallen otherwise
    )
    repairs = _Repairs(model, structure, plan, batches, recipe)
    for number, (step, reached) in enumerate(zip(recipe.prune, progresses, strict=True)):
        before = previous.steps[number] if previous else KeepMasks()
        if reached <= 0:
            plan.steps.append(before)
            continue
        earlier = previous.masks if previous else KeepMasks()
        planner = StepPlanner(model, structure, recipe, step, batches, plan.masks, earlier, movement)
        if planner.updates_weights:
            repairs.make()  # what is repaired is then pruned further, not the other way round
        plan.steps.append(planner.choose(before, reached, plan))
        give_back()
        repairs.ask_for(step, plan.steps[-1])
    repairs.make()
    if looks and given:
        wanted = {name: getattr(asked, name) for name in ("samples", "length") if name in asked.model_fields_set}
        plan.notes += shortfall(given, wanted.get("samples"), wanted.get("length"))
    for name, tensor in plan.replacements.items():
        if not torch.isfinite(tensor).all():
            raise CalibrationError(
                f"the new values of {name} don't fit into {tensor.dtype}; load the model in bfloat16 or float32"
            )
    return plan


class _Repairs:
    """What the steps so far want to be made up for; all of it in one pass, once no further unit leaves."""

    def __init__(
        self,
        model: nn.Module,
        structure: ModelStructure,
        plan: PruningPlan,
        batches: Sequence[Any] | None,
        recipe: Recipe,
    ):
        self.model, self.structure, self.plan, self.batches, self.recipe = model, structure, plan, batches, recipe
        self.wanted = Wanted()
        self.is_due = False

    def ask_for(self, step: Any, masks: KeepMasks) -> None:
        if step.compensation.name == "none" or not masks:
            return
        if not self.batches:
            raise CalibrationError(
                f"compensation {step.compensation.name} of {step.target} is fitted on data; pass `calibration`, an iterable "
                "of the keyword inputs that the model takes"
            )
        self.wanted.add(self.structure, step.target, step.compensation, masks)
        self.is_due = True

    def make(self) -> None:
        if self.is_due:
            assert self.batches is not None
            plan = self.plan
            found = repair(
                self.model,
                self.structure,
                plan.masks,
                self.wanted,
                self.batches,
                replacements=plan.replacements,
                offload=self.recipe.calibration.offload,
                seed=self.recipe.seed,
            )
            give_back()
            plan.replacements.update(found.values)
            plan.added += found.added
            plan.notes += [note for note in found.said() if note not in plan.notes]
            self.is_due = False
