"""`hf-prune sensitivity`: the model and data of a recipe, or of a few words on the command line, scanned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from accelerate import PartialState
from transformers import set_seed

from hf_prune.calibration.self_generated import self_generated
from hf_prune.criteria import get as get_criterion
from hf_prune.criteria.base import Criterion
from hf_prune.errors import RecipeError
from hf_prune.job.models import check_files, model_class, read_config
from hf_prune.job.progress import Stages
from hf_prune.job.run import calibration_batches
from hf_prune.job.sources import load_splits
from hf_prune.job.tasks import prepare
from hf_prune.recipe import Recipe
from hf_prune.recipe.shipped import find_recipe, shipped_recipes
from hf_prune.sensitivity import Sensitivity, scan
from hf_prune.sensitivity.scan import scores_as_it_is


# of a model without a recipe: enough for norms of activations
_CALIBRATION = {"samples": 32, "batch_size": 4}
_TASKS = ("text-generation", "text-classification", "image-classification")


def recipe_to_scan(
    model: str, overrides: Sequence[str] = (), task: str | None = None, data: str | None = None
) -> tuple[Recipe, bool]:
    """The recipe of a scan, and whether it was given as one.

    Args:
        model: a recipe's path or the name of a shipped one, or a model: a Hub id, a directory, `package:NAME/PATH`.
        overrides: keys of the recipe to set.
        task: of a model; told by the class that its config names if None.
        data: of a model, `data.name_or_path`.

    Raises:
        RecipeError: neither is it; the task can't be told; or there are no data.
    """
    if model in shipped_recipes() or model.endswith((".yaml", ".yml")):
        if task or data:
            raise RecipeError(
                "--task and --data go with a model; a recipe says both: set model.task=… data.name_or_path=…"
            )
        return Recipe.from_yaml(find_recipe(model), overrides), True
    if data is None and not any(override.startswith("data.name_or_path=") for override in overrides):
        raise RecipeError(
            f"the scan of {model} measures a loss and needs data: --data PATH_OR_HUB_ID, of the kind that the task takes"
        )
    document: dict[str, Any] = {
        "version": 1,
        "model": {"name_or_path": model, "task": task or _task_of(model)},
        "data": {"name_or_path": data or ""},
        "calibration": dict(_CALIBRATION),
        "prune": [{"target": "layers", "sparsity": 0.5}],  # a recipe has steps; the scan doesn't follow them
    }
    return Recipe.from_dict(document, overrides), False


def run_scan(
    recipe: Recipe,
    stages: Stages,
    *,
    targets: Sequence[str] = (),
    criteria: Mapping[str, Any] | None = None,
    sparsities: Sequence[float],
    samples: int,
    of_steps: bool,
) -> Sensitivity:
    """Load what the recipe says and scan it. Every process of a distributed launch calls it.

    Args:
        recipe: with the sections `model` and `data`.
        stages: where progress is shown.
        targets, criteria, sparsities, samples: see `scan`.
        of_steps: targets and criteria that aren't given are those of the recipe's steps.

    Raises:
        PruneError: a mistake in the recipe, the data or the directories.
    """
    if recipe.model is None or recipe.data is None:
        raise RecipeError("the scan needs the recipe's sections 'model' and 'data'")
    check_files(recipe.model)
    section = recipe.data
    recipe = recipe.model_copy(update={"training": None})  # a new head would make any loss meaningless
    chosen = dict(criteria or {})
    if of_steps:
        targets = targets or list(dict.fromkeys(step.target for step in recipe.prune))
        for step in recipe.prune:
            if step.target in targets and scores_as_it_is(_criterion(step), step.target):
                chosen.setdefault(step.target, {"name": step.criterion.name, **step.criterion.options})
    with stages.stage("data"), PartialState().main_process_first():
        task = prepare(recipe, *load_splits(section, recipe.seed))
    set_seed(recipe.seed)
    with stages.stage("loading"):
        try:
            model = task.load_model().to(PartialState().device)
        except RecipeError as error:
            raise RecipeError(
                f"{error}. (The scan trains nothing: give a trained model, such as `hf-prune run` saves.)"
            ) from error
        asked = recipe.calibration
        batches = calibration_batches(recipe, task)
        batches += self_generated(model, asked.self_generated, asked.length, asked.batch_size, recipe.seed)
    with stages.stage("scan") as bar:
        return scan(
            model,
            batches,
            targets=targets,
            criteria=chosen,
            sparsities=sparsities,
            samples=samples,
            seed=recipe.seed,
            on_site=lambda done, of: bar.update(completed=done, total=of),
        )


def _criterion(step: Any) -> Criterion:
    return get_criterion(step.criterion.name, step.criterion.options)


def _task_of(model: str) -> str:
    """The task whose Auto class builds what the config names."""
    config = read_config(model, key="MODEL")
    named = (getattr(config, "architectures", None) or ["no class"])[0]
    for task in _TASKS:
        mapping = model_class(task)._model_mapping
        if type(config) in mapping and getattr(mapping[type(config)], "__name__", "") == named:
            return task
    raise RecipeError(f"MODEL: {model} is {named}, of which the task can't be told; give --task: {', '.join(_TASKS)}")
