"""The one-shot path: plan, apply, shrink, verify, report. Training runs through the same functions, update by update."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.apply.masks import check_masks, masked_entries, masks_of, set_masks
from hf_prune.apply.replace import remove_biases_, replace_, require_fitting
from hf_prune.apply.shrink import ShrinkRecord, remove_masked_
from hf_prune.apply.verify import Verification
from hf_prune.apply.verify import verify as verify_models
from hf_prune.calibration.batches import first_sample, first_samples, to_device
from hf_prune.checkpoint import Verdict, in_place, settle_config_
from hf_prune.errors import UnsupportedModelError, VerificationError
from hf_prune.plan import PruningPlan
from hf_prune.planning import Batches, RecipeLike, make_plan
from hf_prune.recipe import Recipe
from hf_prune.report import PruningReport
from hf_prune.report.build import Totals, build_report, measure_totals
from hf_prune.structure import ModelStructure, inspect_model
from hf_prune.structure.cost import evaluating
from hf_prune.structure.inputs import example_inputs


def apply_(model: nn.Module, plan: PruningPlan) -> None:
    """Mask what `plan` removes and put its replacement tensors in place, new biases too. Masks only ever grow.

    Args:
        model: what the plan was made for, not yet shrunk; changed in place.
        plan: from `make_plan`, or loaded.

    Raises:
        PruneError: the plan was made for another model.
    """
    _apply(model, plan, replace_)


def _apply(model: nn.Module, plan: PruningPlan, put_: Callable[[nn.Module, dict[str, Tensor]], None]) -> None:
    plan.require_model(model)
    require_fitting(model, plan.replacements, plan.added)
    masks, structure = masks_of(model) & plan.masks, inspect_model(model)
    check_masks(model, masks, structure)
    put_(model, plan.replacements)
    set_masks(model, masks, inspect_model(model) if plan.added else structure)  # new biases are parameters of sites


def shrink_(model: nn.Module) -> ShrinkRecord:
    """Remove what is masked from `model` physically, in place, and make its config say so.

    Neurons, heads and layers leave; masked single weights stay, as zeros. Optimizers made before hold the old
    parameters. Nothing is verified here: `prune_` does that.

    Args:
        model: with masks on, by `apply_`.

    Returns:
        What was removed.

    Raises:
        PruneError: something that is masked can't be removed from this model; `prune_` would have left it as it was.
    """
    return _shrink(model)[0]


def _shrink(
    model: nn.Module, sample: Mapping[str, Any] | None = None, stay_in_place: Collection[str] | None = None
) -> tuple[ShrinkRecord, Verdict]:
    structure = inspect_model(model)
    if stay_in_place is None:
        stay_in_place = in_place(model, _kept_layers(model, structure))
    record = remove_masked_(model, structure, sample, stay_in_place)
    return record, settle_config_(model, record.kept_layers)


def _kept_layers(model: nn.Module, structure: ModelStructure) -> dict[str, list[int]]:
    masks = masks_of(model).units
    return {
        site.name: torch.nonzero(masks[site.key]).reshape(-1).tolist()
        for site in structure.of("layers")
        if site.key in masks and not masks[site.key].all()
    }


def smaller_copy(
    model: nn.Module,
    structure: ModelStructure,
    batches: Sequence[Mapping[str, Any]] = (),
    inputs: str = "calibration",
    sample: Mapping[str, Any] | None = None,
    times: dict[str, float] | None = None,
) -> tuple[nn.Module, Verification | None, Collection[str]]:
    """A copy without what is masked, which computes the same, and the stacks whose layers are stepped over in place.

    A stack of fewer layers is a stock checkpoint. Where it computes something else, since what is outside reads hidden states
    by their numbers, layers that left are stepped over instead.

    Args:
        batches: to verify on; none for no verification.
        inputs: what they are.
        sample: keyword inputs, to see what the modules that leave return.
        times: takes the seconds of each stage.

    Raises:
        VerificationError: either way it computes something else.
    """
    kept = _kept_layers(model, structure)
    failed: VerificationError | None = None
    for stay_in_place in dict.fromkeys((frozenset(in_place(model, kept)), frozenset(kept), frozenset[str]())):
        smaller = copy.deepcopy(model)
        started, verification = time.perf_counter(), None
        try:
            record, _ = _shrink(smaller, sample, stay_in_place)
            shrunk = time.perf_counter()
            if batches:
                verification = verify_models(model, smaller, structure, record, batches, inputs)
        except VerificationError as error:
            failed = failed or error
            del smaller
            continue
        if times is not None:
            times["shrink"] = shrunk - started
            times |= {"verify": time.perf_counter() - shrunk} if batches else {}
        return smaller, verification, stay_in_place
    assert failed is not None
    raise failed


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
    with evaluating(model):
        if shrink and any(not keep.all() for keep in masks.units.values()):
            # a copy goes first: if that fails, the model and all that hold its parameters are as they were
            smaller, verification, stay_in_place = smaller_copy(
                model, structure, batches if verify else (), inputs, dense.sample, times
            )
            pruned = measure_totals(smaller, dense.sample)
            del smaller
            _, verdict = _shrink(model, dense.sample, stay_in_place)
        else:
            pruned = measure_totals(model, dense.sample) if masks.units else dense
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
        _apply(model, plan, undo.replace_)
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
            if entry.name not in plan.replacements
        ]
        self.added = [name for name in plan.added if name not in parameters]
        self.replaced: dict[str, Tensor] = {}

    @torch.no_grad()
    def replace_(self, model: nn.Module, values: dict[str, Tensor]) -> None:
        """Put `values` in place, emptying it on the way: the old value of one parameter takes the room of the new."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name in values.keys() & parameters.keys():
            self.replaced[name] = parameters[name].detach().clone()
            parameters[name].copy_(values.pop(name))
        replace_(model, values)

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> None:
        set_masks(model, self.before)
        remove_biases_(model, self.added)
        replace_(model, self.replaced)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for entry, values in self.entries:
            entry.restore_(parameters[entry.name], values)


def verification_batches(
    model: nn.Module, batches: Batches | None, inputs: str, at_most: int = 2
) -> tuple[list[Mapping[str, Any]], str]:
    """Two samples of each of a few batches, on the model's device: the user's own, else generated ones.

    Two, since of both models all outputs are held at once: of eight windows of 512 tokens and 50,000 words logits alone are
    0.8 GB.
    """
    if batches is not None:
        device = next(model.parameters()).device
        chosen: list[Mapping[str, Any]] = []
        for batch in batches:
            chosen.append(to_device(first_samples(batch, 2), device))
            if len(chosen) == at_most:
                break
        if chosen:
            return chosen, inputs
    try:
        return [example_inputs(model)], "generated"
    except UnsupportedModelError:
        return [], "none"
