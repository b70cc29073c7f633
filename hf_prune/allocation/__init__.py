"""From scores to keep-masks: how much leaves where, and which. One file an allocation; a new one is a file and a line in
the recipe's vocabulary."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_prune.allocation.choice import Choice, select_sites
from hf_prune.allocation.explicit import ByGlob
from hf_prune.allocation.units import choose_units
from hf_prune.allocation.weights import choose_weights, count_weights
from hf_prune.recipe.vocabulary import ALLOCATIONS


if TYPE_CHECKING:
    from hf_prune.allocation.room import Allocation


def get(step: Any) -> Allocation | None:
    """The allocation of a checked step; None where its scope alone says how much leaves where."""
    said = step.allocation
    if said is None:
        return None
    if said.name is None:
        return ByGlob(said.shares, step.scope)
    entry = ALLOCATIONS[said.name]
    return getattr(import_module(f"hf_prune.allocation.{entry.module}"), entry.class_name)(**said.options)


__all__ = ["Choice", "choose_units", "choose_weights", "count_weights", "get", "select_sites"]
