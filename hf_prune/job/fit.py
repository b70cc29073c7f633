"""Whether a recipe can be met on a model of given sizes, told before any weight is read."""

from __future__ import annotations

from torch import nn

from hf_prune.allocation import get as get_allocation
from hf_prune.allocation import select_sites
from hf_prune.apply.replace import takes_bias
from hf_prune.calibration.batches import first_sample
from hf_prune.errors import RecipeError, UnsupportedModelError
from hf_prune.plan import PruningPlan
from hf_prune.planning import make_plan
from hf_prune.planning.repair import Wanted
from hf_prune.recipe import Recipe
from hf_prune.recipe.fields import Compensation, Criterion, MacBudget
from hf_prune.recipe.schema import Step
from hf_prune.report.build import Totals, measure_totals
from hf_prune.structure import inspect_model, require_sites
from hf_prune.structure.inputs import example_inputs
from hf_prune.structure.naming import weight_of


def check_fit(recipe: Recipe, model: nn.Module, dense: Totals) -> PruningPlan | None:
    """Whether the recipe can be met on a model of such sizes: what is named is there, nothing is emptied, budgets and
    patterns fit. What depends on scores is left to the run. On the meta device it costs no memory.

    Args:
        recipe: to be met.
        model: of the sizes, on the meta device.
        dense: its totals.

    Returns:
        A plan of the steps whose numbers follow from sizes alone, with random scores, and no repair but the biases that it
        would add; None if there are none.

    Raises:
        RecipeError: it can't.
        UnsupportedModelError: the model has no unit of a target, with the reason.
    """
    structure = inspect_model(model)
    for number, step in enumerate(recipe.prune):
        get_allocation(step)  # its options can be, and a file that it names is there
        if step.target != "weights":
            require_sites(structure, step.target)
            select_sites(step, structure.of(step.target))
            continue
        for site in select_sites(step, structure.weights):
            d_in, m = site.d_in, step.pattern.m
            if m is not None and d_in % m:
                raise RecipeError(
                    f"prune.{number}.pattern: {m} of {step.pattern.n}:{m} does not divide the {d_in} inputs of "
                    f"{site.name}; add it to exclude"
                )
    steps = _of_sizes(recipe, with_macs=dense.macs is not None)
    if not steps:
        return None
    without = {"criterion": Criterion(name="random"), "compensation": Compensation()}
    plan = make_plan(
        model, recipe.model_copy(update={"prune": tuple(step.model_copy(update=without) for step in steps)})
    )
    wanted = Wanted()
    for step, masks in zip(steps, plan.steps, strict=True):
        if step.compensation.add:
            wanted.add(structure, step.target, step.compensation, masks)
    for name in sorted(wanted.adding):
        if length := takes_bias(model, f"{name}.bias"):
            plan.replacements[f"{name}.bias"] = weight_of(model.get_submodule(name)).new_zeros(length)
            plan.added.append(f"{name}.bias")
    return plan


def _of_sizes(recipe: Recipe, *, with_macs: bool) -> list[Step]:
    """The steps whose numbers follow from sizes alone."""
    return [
        step
        for step in recipe.prune
        if step.target != "weights"
        and step.threshold is None
        and (with_macs or not isinstance(step.sparsity, MacBudget))
    ]


def totals(model: nn.Module) -> Totals:
    """Of a model on the meta device; no MACs where its code asks for a number that only real tensors have."""
    try:
        return measure_totals(model, first_sample([example_inputs(model)]))
    except (RuntimeError, NotImplementedError, UnsupportedModelError):
        return measure_totals(model, None)
