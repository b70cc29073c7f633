"""The one-shot path: plan, apply, shrink, verify, report. Training runs through the same functions, update by update."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.allocation import choose_units, choose_weights, select_sites
from hf_prune.apply.masks import masked_entries, masks_of, set_masks
from hf_prune.apply.present import dropped_blocks, is_inside, present_entries
from hf_prune.apply.shrink import ShrinkRecord, remove_masked_
from hf_prune.apply.verify import Verification
from hf_prune.apply.verify import verify as verify_models
from hf_prune.calibration import collect
from hf_prune.checkpoint import Verdict, allowed_sizes, settle_config_
from hf_prune.criteria import get as get_criterion
from hf_prune.errors import CalibrationError, PruneError, UnsupportedModelError
from hf_prune.plan import KeepMasks, PruningPlan, made_for
from hf_prune.recipe import Recipe
from hf_prune.report import PruningReport
from hf_prune.report.build import Totals, build_report, first_sample, measure_totals
from hf_prune.structure import ModelStructure, Site, WeightSite, inspect_model, require_sites
from hf_prune.structure.cost import UnitCosts, evaluating, mac_costs, parameter_costs
from hf_prune.structure.inputs import example_inputs


RecipeLike = Recipe | Mapping[str, Any] | str | Path
Batches = Iterable[Mapping[str, Any]]


def make_plan(
    model: nn.Module,
    recipe: RecipeLike,
    *,
    calibration: Batches | None = None,
    progress: float | Sequence[float] = 1.0,
    previous: PruningPlan | None = None,
) -> PruningPlan:
    """Decide what leaves `model` by `recipe`. The model is left as it was.

    Args:
        model: any model with sites for the recipe's targets; masks that it has already stay.
        recipe: a `Recipe`, a mapping, or a path to YAML.
        calibration: keyword inputs of the model, batch first; needed by criteria that look at data.
        progress: how much of the final sparsity to reach, in [0, 1]; one number, or one a step of the recipe.
        previous: the plan of the update before: what left by it stays out, and its base counts as the beginning.

    Returns:
        The plan; equal inputs give an equal plan, on one process or many.

    Raises:
        RecipeError: the recipe can't be met on this model.
        CalibrationError: a criterion lacks the data or labels that it needs.
        UnsupportedModelError: the model has no unit of a target, with the reason.
    """
    recipe = Recipe.load(recipe)
    structure = inspect_model(model)
    progresses = list(progress) if isinstance(progress, Sequence) else [progress] * len(recipe.prune)
    batches = list(calibration) if calibration is not None else None
    plan = PruningPlan(
        steps=[],
        base=previous.base if previous else masks_of(model),
        recipe=recipe.to_dict(),
        progress=max(progresses),
        model=made_for(structure),
    )
    for number, (step, reached) in enumerate(zip(recipe.prune, progresses, strict=True)):
        before = previous.steps[number] if previous else KeepMasks()
        if reached <= 0:
            plan.steps.append(before)
            continue
        planner = _StepPlanner(model, structure, recipe, step, batches, plan.masks)
        plan.steps.append(planner.choose(before, reached, plan))
    return plan


class _StepPlanner:
    """One step of a recipe on one model: which sites are eligible, their scores, the choice."""

    def __init__(
        self,
        model: nn.Module,
        structure: ModelStructure,
        recipe: Recipe,
        step: Any,
        batches: list[Mapping[str, Any]] | None,
        kept: KeepMasks,
    ):
        self.model, self.structure, self.recipe, self.step, self.batches = model, structure, recipe, step, batches
        self.kept = kept
        options = dict(step.criterion.options)
        if step.criterion.name == "random" and options.get("seed") is None:
            options["seed"] = recipe.seed
        self.criterion = None if step.remove is not None else get_criterion(step.criterion.name, options)

    def choose(self, before: KeepMasks, progress: float, plan: PruningPlan) -> KeepMasks:
        if self.step.target == "weights":
            weights = select_sites(self.step, self.structure.weights)
            present = {site.name: present_entries(self.structure, self.kept, site) for site in weights}
            earlier = self.kept.weights
            eligible = {name: there & earlier[name] if name in earlier else there for name, there in present.items()}
            gone = {name: ~keep for name, keep in before.weights.items() if name in eligible}
            scores = self._scores(weights)
            chosen = choose_weights(self.step, weights, scores, eligible, gone, progress=progress, present=present)
            keep = KeepMasks(weights=chosen.keep)
        else:
            require_sites(self.structure, self.step.target)
            dropped = dropped_blocks(self.structure, self.kept)
            sites = [
                site
                for site in select_sites(self.step, self.structure.of(self.step.target))
                if site.target == "layers" or not is_inside(site, dropped)
            ]
            eligible = {
                site.key: self.kept.units.get(site.key, torch.ones(site.n_units, dtype=torch.bool)) for site in sites
            }
            gone = {key: ~keep for key, keep in before.units.items() if key in eligible}
            chosen = choose_units(
                self.step,
                sites,
                self._scores(sites),
                eligible,
                gone,
                progress=progress,
                costs=self._costs(),
                loss_units=bool(self.criterion and self.criterion.loss_units),
                allowed_sizes=(lambda group: allowed_sizes(self.model, group)) if self.step.uniform else None,
            )
            keep = KeepMasks(units=chosen.keep)
        plan.notes += [note for note in chosen.notes if note not in plan.notes]
        plan.n_near_ties += chosen.n_near_ties
        # what an earlier update removed stays out, also where its site is no longer in question
        return before & keep

    def _scores(self, sites: Sequence[Site | WeightSite]) -> dict[str, Tensor]:
        if self.criterion is None:
            return {}
        needs = self.criterion.needs(self.step.target)
        model = self.model
        if needs:
            if not self.batches:
                raise CalibrationError(
                    f"criterion {self.step.criterion.name!r} scores {self.step.target} by data; pass `calibration`, an "
                    "iterable of the keyword inputs that the model takes (with labels where it needs a loss)"
                )
            if self.kept != masks_of(model):
                # earlier steps have removed something: score what is left as it will compute, on a scratch copy
                model = copy.deepcopy(model)
                set_masks(model, self.kept)
        statistics = collect(model, self.batches or [], needs, sites, seed=self.recipe.seed) if needs else None
        scores = {}
        for site in sites:
            if isinstance(site, WeightSite):
                scores[site.name] = self.criterion.score_weights(model, site, statistics)
            else:
                scores[site.key] = self.criterion.score_units(model, site, statistics)
        return scores

    def _costs(self) -> UnitCosts | None:
        budget, there = self.step.sparsity, self.kept.units
        if hasattr(budget, "parameters"):
            return parameter_costs(self.model, self.structure, there)
        if hasattr(budget, "macs"):
            try:
                sample = example_inputs(self.model, batch_size=1, length=self.recipe.calibration.length)
            except UnsupportedModelError:
                if not self.batches:
                    raise
                sample = first_sample(verification_batches(self.model, self.batches, "")[0]) or {}
            return mac_costs(self.model, self.structure, there, sample)
        return None


def apply_(model: nn.Module, plan: PruningPlan) -> None:
    """Mask what `plan` removes and put its replacement tensors in place. Masks only ever grow.

    Raises:
        PruneError: the plan was made for another model.
    """
    plan.require_model(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in plan.replacements.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            raise PruneError(f"the plan replaces {name} {tuple(tensor.shape)}, which this model has not")
    masks = masks_of(model) & plan.masks
    set_masks(model, masks)
    with torch.no_grad():
        for name, tensor in plan.replacements.items():
            parameters[name].copy_(tensor)
        if plan.replacements:
            set_masks(model, masks)


def shrink_(model: nn.Module) -> ShrinkRecord:
    """Remove what is masked from `model` physically, in place, and make its config say so.

    Neurons, heads and layers leave; masked single weights stay, as zeros. Optimizers made before hold the old
    parameters. Nothing is verified here: `prune_` does that.

    Returns:
        What was removed.
    """
    return _shrink(model)[0]


def _shrink(model: nn.Module) -> tuple[ShrinkRecord, Verdict]:
    record = remove_masked_(model)
    return record, settle_config_(model, record.kept_layers)


def finish_(
    model: nn.Module,
    recipe: RecipeLike,
    *,
    plan: PruningPlan | None = None,
    batches: Batches | None = None,
    inputs: str = "calibration",
    shrink: bool = True,
    verify: bool = True,
    dense: Totals | None = None,
    seconds: Mapping[str, float] | None = None,
) -> PruningReport:
    """Shrink a masked model, verify it, and put the recipe, report and card on it for `save_pretrained`.

    Args:
        model: with masks on (`apply_`, or at the end of training).
        recipe: what the masks came from.
        plan: the last plan, for its notes.
        batches: inputs to verify on; made up from the config if there are none.
        inputs: what the batches are: "calibration", "training", "evaluation".
        shrink: remove masked units physically; with False the model stays masked.
        verify: compare the smaller model with the masked one.
        dense: parameters and MACs before pruning; measured here, on the masked model, if not given.
        seconds: what earlier stages took.

    Raises:
        VerificationError: the smaller model computes something else; the model is masked, as it was, and its parameters
            are the same objects.
    """
    recipe = Recipe.load(recipe)
    structure, masks = inspect_model(model), masks_of(model)
    batches, inputs = verification_batches(model, batches, inputs)
    dense = dense or measure_totals(model, first_sample(batches))
    times = dict(seconds or {})
    verification: Verification | None = None
    verdict: Verdict | None = None
    started = time.perf_counter()
    with evaluating(model):
        if shrink and any(not keep.all() for keep in masks.units.values()):
            # a copy goes first: if that fails, the model and all that hold its parameters are as they were
            smaller = copy.deepcopy(model)
            record, _ = _shrink(smaller)
            times["shrink"], started = time.perf_counter() - started, time.perf_counter()
            if verify:
                verification = verify_models(model, smaller, structure, record, batches, inputs)
                times["verify"] = time.perf_counter() - started
            pruned = measure_totals(smaller, dense.sample)
            del smaller
            _, verdict = _shrink(model)
        else:
            pruned = measure_totals(model, dense.sample)
    notes = list(plan.notes) if plan else []
    n_bypassed = sum(int((~masks.units[s.key]).sum()) for s in structure.of("layers") if s.key in masks.units)
    if n_bypassed and not shrink:
        notes.append(
            f"{n_bypassed} masked layers are bypassed in memory only: a copy that is saved and loaded computes with them "
            "again. Call shrink_ before saving"
        )
    report = build_report(
        model,
        recipe,
        structure=structure,
        masks=masks,
        shrunk=shrink,
        dense=dense,
        pruned=pruned,
        verification=verification,
        verdict=verdict or settle_config_(model, {}),
        notes=notes,
        seconds=times,
        n_near_ties=plan.n_near_ties if plan else 0,
    )
    report.attach_(model)
    return report


def prune_(
    model: nn.Module,
    recipe: RecipeLike,
    *,
    calibration: Batches | None = None,
    shrink: bool = True,
    verify: bool = True,
) -> PruningReport:
    """Prune `model` in one shot, in place: plan, mask, remove, verify.

    Args:
        model: a Transformers model.
        recipe: a `Recipe`, a mapping, or a path to YAML; its schedule is of no account here.
        calibration: keyword inputs of the model; needed by criteria that look at data, used to verify.
        shrink: remove masked units physically; with False they are masked only.
        verify: compare the smaller model with the masked one before it is handed over.

    Returns:
        The report; print it for a table. `model.save_pretrained` now writes a checkpoint that loads again.

    Raises:
        PruneError: the recipe, the data or the model won't do, or verification failed; the model is as it was.
    """
    recipe = Recipe.load(recipe)
    batches = list(calibration) if calibration is not None else None
    dense = measure_totals(model, first_sample(verification_batches(model, batches, "calibration")[0]))
    started = time.perf_counter()
    plan = make_plan(model, recipe, calibration=batches)
    planned = time.perf_counter() - started
    undo = _Undo(model, plan)
    try:
        apply_(model, plan)
        return finish_(
            model,
            recipe,
            plan=plan,
            batches=batches,
            shrink=shrink,
            verify=verify,
            dense=dense,
            seconds={"plan": planned},
        )
    except BaseException:
        undo(model)
        raise


class _Undo:
    """Brings back what a plan zeroes or replaces, and the masks that were there before."""

    def __init__(self, model: nn.Module, plan: PruningPlan):
        self.before = masks_of(model)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self.entries = [
            (entry, entry.values(parameters[entry.name]))
            for entry in masked_entries(inspect_model(model), self.before & plan.masks)
        ]
        self.replaced = {name: parameters[name].detach().clone() for name in plan.replacements}

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> None:
        set_masks(model, self.before)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, value in self.replaced.items():
            parameters[name].copy_(value)
        for entry, values in self.entries:
            entry.restore_(parameters[entry.name], values)


def verification_batches(
    model: nn.Module, batches: Batches | None, inputs: str, at_most: int = 2
) -> tuple[list[Mapping[str, Any]], str]:
    """A few batches on the model's device: the user's own, else generated ones."""
    if batches is not None:
        device = next(model.parameters()).device
        chosen: list[Mapping[str, Any]] = []
        for batch in batches:
            chosen.append({k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})
            if len(chosen) == at_most:
                break
        if chosen:
            return chosen, inputs
    try:
        return [example_inputs(model)], "generated"
    except UnsupportedModelError:
        return [], "none"
