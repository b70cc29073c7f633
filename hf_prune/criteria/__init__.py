"""Criteria: what a unit or a weight is worth. One file each; a new one is a file and a line in the recipe's vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_prune.recipe.vocabulary import CRITERIA


if TYPE_CHECKING:
    from hf_prune.criteria.base import Criterion


def get(name: str, options: Mapping[str, Any] | None = None) -> Criterion:
    """The criterion `name` with its options; both as a checked recipe has them."""
    entry = CRITERIA[name]
    return getattr(import_module(f"hf_prune.criteria.{entry.module}"), entry.class_name)(**(options or {}))
