"""One step of a recipe on one model: which sites are eligible, their scores, the choice."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.allocation import Choice, choose_units, choose_weights, count_weights, select_sites
from hf_prune.allocation import get as get_allocation
from hf_prune.allocation.room import Allocate, Look
from hf_prune.apply.masks import masks_of, set_masks
from hf_prune.apply.present import dropped_modules, is_inside, present_entries, units_there
from hf_prune.calibration import collect
from hf_prune.calibration.batches import at_most, first_sample, to_device
from hf_prune.calibration.statistics import NEEDS_OF_READS, NEEDS_OF_TRAINING, Statistics
from hf_prune.checkpoint import allowed_sizes
from hf_prune.criteria import get as get_criterion
from hf_prune.criteria.base import Criterion, PrunesMatrices, RanksUnits, RemovesUnits
from hf_prune.errors import CalibrationError, RecipeError, UnsupportedModelError
from hf_prune.plan import KeepMasks, PruningPlan
from hf_prune.planning.block_by_block import BlockByBlock
from hf_prune.recipe import Recipe
from hf_prune.recipe.fields import weighted_criteria
from hf_prune.recipe.vocabulary import CRITERIA
from hf_prune.structure import ModelStructure, Site, WeightSite, require_sites
from hf_prune.structure.cost import UnitCosts, mac_costs, parameter_costs
from hf_prune.structure.inputs import example_inputs


def criterion_of(step: Any, seed: int) -> Criterion | None:
    """What scores a step's units or weights, if anything does; `seed` is the recipe's."""
    if step.remove is not None:
        return None
    return get_criterion(step.criterion.name, _seeded(step.criterion.name, step.criterion.options, seed))


def _seeded(name: str, options: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The options with the recipe's seed for `random` where it has none of its own, also inside of `combined`."""
    if name == "random":
        return {"seed": seed, **options}
    if "of" not in options:
        return dict(options)
    parts = weighted_criteria(options["of"])
    return {"of": {part: {"weight": weight, **_seeded(part, its, seed)} for part, (weight, its) in parts.items()}}


def scores_training(step: Any) -> bool:
    """Whether a step's criterion scores what training does to the weights."""
    criterion = criterion_of(step, seed=0)
    return criterion is not None and bool(criterion.needs(step.target) & NEEDS_OF_TRAINING)


def reads_data(step: Any) -> bool:
    """Whether a step's criterion, allocation or compensation looks at calibration data."""
    criterion, allocation = criterion_of(step, seed=0), get_allocation(step)
    measures = isinstance(criterion, (PrunesMatrices, RanksUnits, RemovesUnits))
    looks = any(each.needs(step.target) for each in (criterion, allocation) if each)
    return measures or looks or step.compensation.name != "none"


def refuse_without_training(recipe: Recipe) -> None:
    """Raise where a criterion scores training and there is none.

    Raises:
        RecipeError: naming the step, and what goes instead.
    """
    for number, step in enumerate(recipe.prune):
        if scores_training(step):
            raise RecipeError(
                f"prune.{number}.criterion: {step.criterion.name} scores what training does to the weights, and there is "
                "none here; use PruningTrainer, Pruner or a recipe's `training` section, or in one shot taylor"
            )


class StepPlanner:
    """One step of a recipe on one model: which sites are eligible, their scores, the choice."""

    def __init__(
        self,
        model: nn.Module,
        structure: ModelStructure,
        recipe: Recipe,
        step: Any,
        batches: list[Mapping[str, Any]] | None,
        kept: KeepMasks,
        earlier: KeepMasks,
        movement: Mapping[str, Tensor] | None,
    ):
        self.model, self.structure, self.recipe, self.step, self.batches = model, structure, recipe, step, batches
        self.kept = kept  # by the steps before
        self.left = kept & earlier  # and by all steps at the update before
        self.movement = movement  # that training gathered, by site key
        self.criterion = criterion_of(step, recipe.seed)
        self.allocation = get_allocation(step)
        self.looked: tuple[nn.Module, Statistics] | None = None

    @property
    def updates_weights(self) -> bool:
        """Whether the criterion goes block by block, and gives the weights that stay new values."""
        return isinstance(self.criterion, (PrunesMatrices, RemovesUnits))

    def choose(self, before: KeepMasks, progress: float, plan: PruningPlan) -> KeepMasks:
        """What the step keeps after this update; notes, near-ties and new values go into `plan`."""
        choose = self._choose_weights if self.step.target == "weights" else self._choose_units
        # what an earlier update removed stays out, also where its site is no longer in question
        return before & choose(before, progress, plan)

    def _choose_weights(self, before: KeepMasks, progress: float, plan: PruningPlan) -> KeepMasks:
        weights = select_sites(self.step, self.structure.weights)
        self._refuse_convolutions(weights)
        present = {site.name: present_entries(self.structure, self.kept, site) for site in weights}
        earlier = self.kept.weights
        eligible = {name: there & earlier[name] if name in earlier else there for name, there in present.items()}
        gone = {name: ~keep for name, keep in before.weights.items() if name in eligible}
        if isinstance(self.criterion, PrunesMatrices):
            allocate = self._allocate(weights, eligible)
            out = count_weights(self.step, weights, eligible, gone, progress=progress, allocate=allocate)
            return self._block_by_block(plan).prune_weights(self.criterion, weights, eligible, gone, out, progress)
        self._look(weights)
        # where matrices don't compete, the scores of one are there at a time
        compete = self.allocation is not None or self.step.scope == "global"
        chosen = Choice({})
        for pool in [weights] if compete else [[site] for site in weights]:
            chosen += choose_weights(
                self.step,
                pool,
                self._scores(pool, gone),
                eligible,
                gone,
                progress=progress,
                present=present,
                as_they_are=bool(self.criterion and self.criterion.loss_units)
                or CRITERIA[self.step.criterion.name].same_unit,
                allocate=self._allocate(pool, eligible),
            )
        _tell(plan, chosen)
        return KeepMasks(weights=chosen.keep)

    def _refuse_convolutions(self, sites: Sequence[WeightSite]) -> None:
        """What looks at the inputs of a matrix can't at those of a convolution."""
        looks = isinstance(self.criterion, PrunesMatrices) or any(
            each.needs("weights") & NEEDS_OF_READS for each in (self.criterion, self.allocation) if each
        )
        if looks and (odd := next((site.name for site in sites if not site.is_matrix), None)):
            raise RecipeError(
                f"criterion {self.step.criterion.name} looks at the inputs of a matrix, and {odd} is a convolution's: exclude "
                "it, or take one that looks at weights or gradients, such as l1"
            )

    def _choose_units(self, before: KeepMasks, progress: float, plan: PruningPlan) -> KeepMasks:
        require_sites(self.structure, self.step.target, self.step.part)
        dropped = dropped_modules(self.structure, self.kept)
        sites = [
            site
            for site in select_sites(self.step, self.structure.of(self.step.target, self.step.part))
            if not is_inside(site, dropped)
        ]
        leaving = [site.key for site in self.structure if is_inside(site, dropped)]
        eligible = {site.key: units_there(self.structure, self.kept, site) & site.can_leave for site in sites}
        gone = {key: ~keep for key, keep in before.units.items() if key in eligible}
        choose = partial(
            choose_units,
            self.step,
            sites,
            eligible=eligible,
            removed_before=gone,
            progress=progress,
            costs=self._costs(),
            loss_units=bool(self.criterion and self.criterion.loss_units),
            allowed_sizes=(lambda group: allowed_sizes(self.model, group, leaving)) if self.step.uniform else None,
            allocate=self._allocate(sites, eligible),
        )
        if isinstance(self.criterion, (RanksUnits, RemovesUnits)):
            # how many leave each site doesn't depend on scores here; which, it measures with that many in mind
            counted = choose(scores={site.key: torch.zeros(site.n_units) for site in sites})
            there = {key: mask & ~gone[key] if key in gone else mask for key, mask in eligible.items()}
            n_removed = {key: int((there[key] & ~keep).sum()) for key, keep in counted.keep.items()}
            if isinstance(self.criterion, RemovesUnits):
                _tell(plan, Choice({}, counted.notes))
                return self._block_by_block(plan).remove_units(self.criterion, sites, there, n_removed)
            scores = self.criterion.rank_units(
                self._as_left(), sites, self._require_batches(), n_removed, there, self.recipe.seed
            )
            self._require_finite(scores)
        else:
            scores = self._scores(sites, gone)
        chosen = choose(scores=scores)
        _tell(plan, chosen)
        return KeepMasks(units=chosen.keep)

    def _scores(self, sites: Sequence[Site | WeightSite], gone: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.criterion is None:
            return {}
        model, statistics = self._look(sites)
        scores = {}
        for site in sites:
            if isinstance(site, WeightSite):
                scores[site.name] = self.criterion.score_weights(model, site, statistics)
            else:
                scores[site.key] = self.criterion.score_units(model, site, statistics)
        if self.step.threshold is not None and gone:
            # what has left counts as below a threshold, whatever it would score now
            least = min(float(score.min()) for score in scores.values())
            scores |= {name: scores[name].masked_fill(out, least) for name, out in gone.items() if name in scores}
        self._require_finite(scores)
        return scores

    def _require_finite(self, scores: Mapping[str, Tensor]) -> None:
        for key, values in scores.items():
            if not torch.isfinite(values).all():
                raise CalibrationError(
                    f"criterion {self.step.criterion.name!r} gives {key} scores that are not finite; expected numbers. Look "
                    "for weights that are inf or nan, as after training with too high a learning rate, or load the model in "
                    "bfloat16 or float32"
                )

    def _allocate(self, sites: Sequence[Site | WeightSite], eligible: Mapping[str, Tensor]) -> Allocate | None:
        if self.allocation is None:
            return None
        model, statistics = self._look(sites)
        return partial(self.allocation.pools, look=Look(model, self.structure, eligible, statistics))

    def _look(self, sites: Sequence[Site | WeightSite]) -> tuple[nn.Module, Statistics]:
        """The model that criterion and allocation look at, and all that they need to know of it, from one pass."""
        if self.looked is not None:
            return self.looked
        needs = frozenset().union(
            *(each.needs(self.step.target) for each in (self.criterion, self.allocation) if each)
        )
        of_data = needs - NEEDS_OF_TRAINING
        model, statistics = self.model, Statistics()
        if of_data:
            model = self._as_left()
            # an allocation that looks too looks at all
            own = None if self.allocation else self.criterion
            batches = at_most(self._require_batches(), getattr(own, "samples", None))
            labels = getattr(own, "labels", "given")
            statistics = collect(model, batches, of_data, sites, labels=labels, seed=self.recipe.seed)
        if needs & NEEDS_OF_TRAINING:
            statistics.movement = self._require_movement(sites)
        self.looked = model, statistics
        return self.looked

    def _require_batches(self) -> list[Mapping[str, Any]]:
        if not self.batches:
            if self.allocation is not None and self.allocation.needs(self.step.target):
                raise CalibrationError(
                    f"allocation {self.step.allocation.name!r} looks at data; pass `calibration`, an iterable of the "
                    "keyword inputs that the model takes"
                )
            raise CalibrationError(
                f"criterion {self.step.criterion.name!r} scores {self.step.target} by data; pass `calibration`, an "
                "iterable of the keyword inputs that the model takes (with labels where it needs a loss)"
            )
        return self.batches

    def _require_movement(self, sites: Sequence[Site | WeightSite]) -> dict[str, Tensor]:
        assert self.movement is not None, "refused by `refuse_without_training`"
        movement = {site.key: self.movement[site.key] for site in sites}
        for key, values in movement.items():
            if not torch.isfinite(values).all():
                raise CalibrationError(
                    f"the movement of {key} is not finite: a gradient or weight was not. Train with a lower learning "
                    "rate or in bfloat16, or clip gradients"
                )
        if movement and not any(values.any() for values in movement.values()):
            raise CalibrationError(
                f"criterion {self.step.criterion.name!r} has seen no gradient: hand Pruner the optimizer that trains the "
                "model, and call step() after each of its steps"
            )
        return movement

    def _as_left(self) -> nn.Module:
        """The model without what earlier steps and updates removed: itself, or a scratch copy."""
        if self.left == masks_of(self.model):
            return self.model
        model = copy.deepcopy(self.model)
        set_masks(model, self.left)
        return model

    def _block_by_block(self, plan: PruningPlan) -> BlockByBlock:
        return BlockByBlock(
            self.model, self.structure, self.recipe, self.step, self._require_batches(), self.kept, plan
        )

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
                device = next(self.model.parameters()).device
                sample = to_device(first_sample(self.batches) or {}, device)
            return mac_costs(self.model, self.structure, there, sample)
        return None


def _tell(plan: PruningPlan, chosen: Choice) -> None:
    """What a choice has to say goes into the plan, each note once."""
    plan.notes += [note for note in chosen.notes if note not in plan.notes]
    plan.n_near_ties += chosen.n_near_ties
