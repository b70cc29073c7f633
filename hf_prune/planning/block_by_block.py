"""A step whose criterion chooses and updates together, on the model as earlier steps and their repairs leave it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.criteria.base import PrunesMatrices, RemovesUnits
from hf_prune.errors import CalibrationError, RecipeError
from hf_prune.plan import KeepMasks, PruningPlan
from hf_prune.planning.sparsify import Prune, sparsify
from hf_prune.recipe import Recipe
from hf_prune.structure import ModelStructure, Site, WeightSite


@dataclass
class BlockByBlock:
    """One step; new values and near-ties go into `plan`."""

    model: nn.Module
    structure: ModelStructure
    recipe: Recipe
    step: Any
    batches: Sequence[Mapping[str, Any]]
    kept: KeepMasks  # by the steps before
    plan: PruningPlan

    def prune_weights(
        self,
        criterion: PrunesMatrices,
        sites: Sequence[WeightSite],
        eligible: Mapping[str, Tensor],
        gone: Mapping[str, Tensor],
        n_removed: Mapping[str, int],
        progress: float,
    ) -> KeepMasks:
        """What stays of each matrix.

        Args:
            criterion: that the step names.
            sites: the matrices.
            eligible: by parameter name, the entries that were there when the step began.
            gone: by parameter name, those that an earlier update removed.
            n_removed: by parameter name, how many of the eligible are to be gone; of no account for N:M.
            progress: the part of the final sparsity to reach now.
        """
        pattern = self.step.pattern
        group = (pattern.n, pattern.m) if pattern.kind == "n_m" else None
        if group and progress < 1:
            raise RecipeError(
                f"criterion {self.step.criterion.name} prunes N:M at once: use schedule one_shot, or another criterion"
            )
        left = {name: mask & ~gone[name] if name in gone else mask for name, mask in eligible.items()}

        def prune(site: WeightSite, matrix: Tensor, gram: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
            rows, columns = (torch.nonzero(there.any(dim)).reshape(-1) for dim in (1, 0))
            if group and len(columns) % group[1]:
                raise RecipeError(
                    f"{site.name}: {group[1]} of {group[0]}:{group[1]} does not divide its {len(columns)} inputs; exclude it"
                )
            n_left = int(there.sum())
            n_leaving = 0 if group else max(0, n_removed[site.name] - (int(eligible[site.name].sum()) - n_left))
            if (len(rows), len(columns)) == there.shape:
                keep, values, n_near_ties = criterion.prune(matrix, gram, there, n_leaving, group)
            else:
                keep, values = torch.zeros_like(there), torch.zeros_like(matrix, dtype=torch.float32)
                if not n_left:
                    return keep, values
                inner = (rows[:, None], columns)
                keep[inner], values[inner], n_near_ties = criterion.prune(
                    matrix[inner], gram[columns][:, columns], there[inner], n_leaving, group
                )
            self.plan.n_near_ties += n_near_ties
            return keep, values

        return KeepMasks(weights=self._run(criterion, sites, left, prune))

    def remove_units(
        self, criterion: RemovesUnits, sites: Sequence[Site], there: Mapping[str, Tensor], n_removed: Mapping[str, int]
    ) -> KeepMasks:
        """What stays of each site's units: `n_removed` of those that are `there` leave.

        Raises:
            RecipeError: a site's units are not read by one linear layer.
        """
        matrices = {site.module: site for site in self.structure.weights}
        by_matrix: dict[str, Site] = {}
        for site in sites:
            reads = [read.module for read in site.reads]
            if len(reads) != 1 or reads[0] not in matrices:
                raise RecipeError(
                    f"criterion {self.step.criterion.name} is for units that one linear layer reads; {site.name} is read by "
                    f"{', '.join(reads) or 'none'}: exclude it, or take another criterion"
                )
            by_matrix[matrices[reads[0]].name] = site
        keep: dict[str, Tensor] = {}

        def prune(weight: WeightSite, matrix: Tensor, gram: Tensor, all_: Tensor) -> tuple[Tensor, Tensor]:
            site = by_matrix[weight.name]
            (read,) = site.reads
            start, width = read.span.start, read.span.width
            columns = torch.arange(start, start + site.n_units * width, device=matrix.device).reshape(-1, width)
            removed = criterion.remove_units(
                matrix, gram, columns, there[site.key].to(matrix.device), n_removed[site.key]
            )
            self.plan.n_near_ties += removed.n_near_ties
            keep[site.key] = removed.keep.cpu()
            return all_, removed.values

        weights = [matrices[site.reads[0].module] for site in sites]
        all_ = {weight.name: torch.ones(weight.shape, dtype=torch.bool) for weight in weights}
        self._run(criterion, weights, all_, prune)
        return KeepMasks(units=keep)

    def _run(
        self,
        criterion: PrunesMatrices | RemovesUnits,
        sites: Sequence[WeightSite],
        there: Mapping[str, Tensor],
        prune: Prune,
    ) -> dict[str, Tensor]:
        """`prune` each matrix as those before it leave its inputs. The keep-masks by name."""

        def named(site: WeightSite, *of_matrix: Tensor) -> tuple[Tensor, Tensor]:
            try:
                return prune(site, *of_matrix)
            except CalibrationError as error:
                raise CalibrationError(f"{site.name}: {error}") from error

        done = sparsify(
            self.model,
            self.structure,
            self.kept,
            self.plan.replacements,
            sites,
            there,
            named,
            self.batches,
            dense_target=criterion.dense_target,
            offload=self.recipe.calibration.offload,
            seed=self.recipe.seed,
        )
        self.plan.replacements.update(done.values)
        return done.keep
