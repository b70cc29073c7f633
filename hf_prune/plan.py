"""The plan: the waist of the library. All above decides and leaves the model untouched; all below executes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class KeepMasks:
    """Boolean masks, True is kept. `units` by site key, shape (n_units,); `weights` by parameter name, its shape.

    What has no entry is kept whole. Masks live on the CPU; they are data, never derived from `w != 0`.
    """

    units: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)

    def __and__(self, other: KeepMasks) -> KeepMasks:
        """Kept in both: what left stays out."""
        return KeepMasks(_both(self.units, other.units), _both(self.weights, other.weights))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, KeepMasks):
            return NotImplemented
        return _equal(self.units, other.units) and _equal(self.weights, other.weights)

    def __bool__(self) -> bool:
        return any(not mask.all() for mask in (*self.units.values(), *self.weights.values()))

    @staticmethod
    def all_of(masks: Iterable[KeepMasks]) -> KeepMasks:
        """Kept in all of them."""
        kept = KeepMasks()
        for each in masks:
            kept = kept & each
        return kept


def _both(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**a, **{name: a[name] & mask if name in a else mask for name, mask in b.items()}}


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@dataclass
class PruningPlan:
    """What leaves, by step of the recipe, and the tensors that replace others; deciding is over.

    `base` holds the masks that were on the model before the recipe's first plan, `steps` one keep-mask set for
    each step, `replacements` new tensors by parameter name (empty unless a method updates weights), `notes` what
    the user should hear (rounding that could not be met, rules that removed nothing).
    """

    steps: list[KeepMasks]
    base: KeepMasks = field(default_factory=KeepMasks)
    replacements: dict[str, Tensor] = field(default_factory=dict)
    recipe: dict[str, Any] | None = None
    progress: float = 1.0
    notes: list[str] = field(default_factory=list)
    # near-ties: units within float32 rounding of the cut, reported because another machine may choose differently
    n_near_ties: int = 0

    @property
    def masks(self) -> KeepMasks:
        """Everything kept after this plan."""
        return KeepMasks.all_of([self.base, *self.steps])
