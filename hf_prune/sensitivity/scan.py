"""The scan: each site pruned alone, the blocks behind it run again, the loss measured; all from one calibrated pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.allocation import choose_units, choose_weights
from hf_prune.allocation.room import name_of
from hf_prune.apply.masks import masked_entries
from hf_prune.calibration import Statistics, collect
from hf_prune.calibration.batches import Batch, dealt, n_samples, take
from hf_prune.calibration.behind import loss_behind, loss_of, mean_losses, through
from hf_prune.calibration.blocks import Chain, record_chain
from hf_prune.calibration.collect import evaluation, is_stacked
from hf_prune.calibration.loss import with_labels
from hf_prune.calibration.statistics import NEEDS_OF_READS, NEEDS_OF_TRAINING
from hf_prune.criteria import get as get_criterion
from hf_prune.criteria.base import Criterion, PrunesMatrices, RanksUnits, RemovesUnits
from hf_prune.errors import CalibrationError, RecipeError, UnsupportedModelError
from hf_prune.plan import KeepMasks
from hf_prune.recipe import Recipe
from hf_prune.sensitivity.curves import Curve, Sensitivity
from hf_prune.structure import ModelStructure, Site, WeightSite, inspect_model, require_sites, stacks_of
from hf_prune.structure.naming import is_within
from hf_prune.structure.sites import Target


DEFAULT_SPARSITIES = (0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
# what chooses units where the caller doesn't say
CRITERIA = {
    "layers": "block_influence",
    "attention_heads": "activation",
    "ffn_neurons": "activation",
    "experts": "activation",
    "weights": "wanda",
}


def scan(
    model: nn.Module,
    calibration: Sequence[Mapping[str, Any]],
    *,
    targets: Sequence[str] = (),
    criteria: Mapping[str, Any] | None = None,
    sparsities: Sequence[float] = DEFAULT_SPARSITIES,
    samples: int = 8,
    seed: int = 0,
    on_site: Callable[[int, int], None] = lambda done, of: None,
) -> Sensitivity:
    """Loss against sparsity of each site of `model`, which is left as it was. Every process passes the same.

    Args:
        model: a Transformers model.
        calibration: keyword inputs, batch first, with labels where the model needs them for a loss.
        targets: what to prune, one at a time; all that the model has if empty.
        criteria: by target, a criterion as a recipe has it; see `CRITERIA` for the others.
        sparsities: fractions of each site.
        samples: how many of the calibration samples losses are measured on; criteria see all.
        seed: of the private random state.
        on_site: called with how many sites are done, of how many.

    Raises:
        CalibrationError: no data, or no finite loss.
        RecipeError: a target, criterion or sparsity that can't be.
        UnsupportedModelError: the model has no unit of a target that was asked for.
    """
    if not sparsities or not all(0 < sparsity < 1 for sparsity in sparsities):
        raise RecipeError(f"the sparsities are {list(sparsities)}; expected fractions between 0 and 1")
    if samples < 1:
        raise RecipeError(f"samples is {samples}; expected at least 1")
    structure = inspect_model(model)
    run = _Run(model, structure, sorted(set(sparsities)), seed, on_site)
    for target in targets or CRITERIA:
        run.add(target, (criteria or {}).get(target) or CRITERIA.get(target, "l1"), required=bool(targets))
    if stray := sorted((criteria or {}).keys() - set(targets or CRITERIA)):
        raise RecipeError(f"criteria are given for {', '.join(stray)}, which is not scanned; scan it too or drop them")
    batches = list(calibration)
    n_given = sum(n_samples(batch, index) for index, batch in enumerate(batches))
    if not n_given:
        raise CalibrationError(
            "the scan measures a loss; pass `calibration`, an iterable of the model's keyword inputs"
        )
    run.collect(batches)
    chosen = take(batches, min(samples, n_given))
    with evaluation(model, seed), torch.no_grad():
        mine = [with_labels(model, batch) for batch in dealt(chosen, next(model.parameters()).device)]
        return run.measure(mine, min(samples, n_given))


def scores_as_it_is(criterion: Criterion, target: Target) -> bool:
    """Whether a criterion scores units or weights of a model as it is: doesn't choose by itself, nor while training."""
    chooses = isinstance(criterion, (PrunesMatrices, RanksUnits, RemovesUnits))
    return not chooses and not criterion.needs(target) & NEEDS_OF_TRAINING


@dataclass
class _Run:
    """One scan."""

    model: nn.Module
    structure: ModelStructure
    sparsities: list[float]
    seed: int
    on_site: Callable[[int, int], None]
    steps: dict[str, list[Any]] = field(default_factory=dict)  # by target, a recipe's step for each sparsity
    criteria: dict[str, Criterion] = field(default_factory=dict)
    sites: list[Site | WeightSite] = field(default_factory=list)
    statistics: Statistics = field(default_factory=Statistics)
    curves: dict[str, Curve] = field(default_factory=dict)  # by site key
    layers: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, target: str, criterion: Any, required: bool) -> None:
        """Take up the sites of a target."""
        prune = [{"target": target, "sparsity": sparsity, "criterion": criterion} for sparsity in self.sparsities]
        steps = list(Recipe.from_dict({"version": 1, "prune": prune}).prune)  # checks the names
        said = steps[0].criterion
        scorer = get_criterion(said.name, said.options)
        if not scores_as_it_is(scorer, steps[0].target):
            raise RecipeError(
                f"criterion {said.name} doesn't score {target} on a model as it is; take another for the scan, such as "
                f"{CRITERIA[target]}"
            )
        if target == "weights":
            sites: Sequence[Site | WeightSite] = self.structure.weights
        else:
            kind = steps[0].target
            sites = require_sites(self.structure, kind) if required else self.structure.of(kind)
            if not required and scorer.needs(kind) & NEEDS_OF_READS:
                sites = [site for site in sites if not is_stacked(site)]
        if sites:
            self.steps[target], self.criteria[target] = steps, scorer
            self.sites += sites

    def collect(self, batches: Sequence[Mapping[str, Any]]) -> None:
        """All statistics of all targets, in one pass."""
        needs: frozenset[str] = frozenset()
        for target, criterion in self.criteria.items():
            needs |= criterion.needs(self.steps[target][0].target)
        if needs:
            self.statistics = collect(self.model, batches, needs, self.sites, seed=self.seed)

    def measure(self, batches: Sequence[Batch], n_measured: int) -> Sensitivity:
        """Every curve: stack by stack, block by block, and what is in no chain of blocks on the whole model."""
        dense = float(self._losses(batches, lambda number: loss_of(self.model, batches[number])))
        left = {site.key: site for site in self.sites}
        for name, blocks in stacks_of(self.model).items():
            try:
                chain = record_chain(self.model, name, blocks, batches, {})
            except UnsupportedModelError as error:
                self.notes.append(f"{error}; its sites are measured on the whole model, its layers not at all")
                continue
            for stack in [site for site in left.values() if isinstance(site, Site) and site.blocks == tuple(blocks)]:
                del left[stack.key]
                self._layers(stack, chain, dense)
            is_shared = len(set(blocks)) < len(blocks)
            for position, block in enumerate(() if is_shared else blocks):
                for site in [site for site in left.values() if _is_in(site, block)]:
                    behind = range(position, len(blocks))
                    self._curve(
                        left.pop(site.key),
                        batches,
                        dense,
                        lambda number: self._behind(chain, number, behind),  # noqa: B023
                    )
                chain.run_(position, self.model.get_submodule(block))
        for site in left.values():
            if not (isinstance(site, Site) and site.blocks):
                self._curve(site, batches, dense, lambda number: loss_of(self.model, batches[number]))
        return Sensitivity(
            model=type(self.model).__name__,
            loss=dense,
            n_samples=n_measured,
            criteria={target: steps[0].criterion.name for target, steps in self.steps.items()},
            sparsities=self.sparsities,
            sites=[self.curves[site.key] for site in self.sites if site.key in self.curves],
            layers=[layer for site in self.sites for layer in self.layers.get(site.key, ())],
            notes=self.notes,
        )

    def _curve(
        self, site: Site | WeightSite, batches: Sequence[Batch], dense: float, loss: Callable[[int], Tensor]
    ) -> None:
        """Losses with ever more of one site masked; `loss` is of one batch, by the model as it then is."""
        score = self._score(site)

        def measure(keep: Tensor) -> float:
            with _masked(self.model, self.structure, site, keep):
                return float(self._losses(batches, loss))

        self._add(site, [self._keep(site, step, score) for step in self.steps[_target(site)]], measure, dense)

    def _layers(self, site: Site, chain: Chain, dense: float) -> None:
        """The curve of a stack, layers leaving by their scores; and the loss without each single layer."""

        def measure(keep: Tensor) -> float:
            kept = torch.nonzero(keep).reshape(-1).tolist()
            return float(self._losses(chain.batches, lambda number: self._behind(chain, number, kept)))

        score = self._score(site)
        self._add(site, [self._keep(site, step, score) for step in self.steps["layers"]], measure, dense)
        alone = torch.eye(site.n_units, dtype=torch.bool)
        names = [block if not site.is_shared else f"{block}, call {n}" for n, block in enumerate(site.blocks)]
        self.layers[site.key] = [
            {"name": name, "loss": measure(~gone)} for name, gone in zip(names, alone, strict=True)
        ]

    def _add(
        self, site: Site | WeightSite, keeps: Sequence[Tensor], measure: Callable[[Tensor], float], dense: float
    ) -> None:
        gone, losses = [float((~keep).double().mean()) for keep in keeps], []
        known = {0.0: dense}  # several sparsities may come to the same few units
        for keep, share in zip(keeps, gone, strict=True):
            if share not in known:
                known[share] = measure(keep)
            losses.append(known[share])
        n_units = keeps[0].numel()
        self.curves[site.key] = Curve(site.key, _target(site), site.name, n_units, gone, losses)
        self.on_site(len(self.curves), len(self.sites))

    def _score(self, site: Site | WeightSite) -> Tensor:
        criterion = self.criteria[_target(site)]
        if isinstance(site, WeightSite):
            return criterion.score_weights(self.model, site, self.statistics)
        return criterion.score_units(self.model, site, self.statistics)

    def _keep(self, site: Site | WeightSite, step: Any, score: Tensor) -> Tensor:
        """What stays of one site at a step's sparsity."""
        if isinstance(site, WeightSite):
            there = {site.name: torch.ones(site.shape, dtype=torch.bool)}
            return choose_weights(step, [site], {site.name: score}, there, {}, progress=1.0).keep[site.name]
        there = {site.key: torch.ones(site.n_units, dtype=torch.bool)}
        return choose_units(step, [site], {site.key: score}, there, {}, progress=1.0).keep[site.key]

    def _behind(self, chain: Chain, number: int, positions: Sequence[int]) -> Tensor:
        hidden = through(self.model, chain, number, chain.hidden[number], positions)
        return loss_behind(self.model, chain, number, hidden)

    def _losses(self, batches: Sequence[Batch], loss: Callable[[int], Tensor]) -> Tensor:
        return mean_losses(self.model, batches, lambda number: [loss(number)], 1)


@contextmanager
def _masked(model: nn.Module, structure: ModelStructure, site: Site | WeightSite, keep: Tensor) -> Iterator[None]:
    """Inside, what isn't kept of a site is zero; afterwards the very bits are back."""
    masks = KeepMasks(weights={site.name: keep}) if isinstance(site, WeightSite) else KeepMasks({site.key: keep})
    parameters = dict(model.named_parameters(remove_duplicate=False))
    entries = [(entry, parameters[entry.name]) for entry in masked_entries(structure, masks)]
    before = [entry.values(parameter) for entry, parameter in entries]
    try:
        for entry, parameter in entries:
            entry.zero_(parameter)
        yield
    finally:
        for (entry, parameter), values in reversed([*zip(entries, before, strict=True)]):
            entry.restore_(parameter, values)


def _target(site: Site | WeightSite) -> str:
    return "weights" if isinstance(site, WeightSite) else site.target


def _is_in(site: Site | WeightSite, block: str) -> bool:
    """Whether all of a site lies in a block."""
    if isinstance(site, WeightSite):
        return is_within(name_of(site), block)
    return bool(site.slices) and all(is_within(piece.module, block) for piece in site.slices)
