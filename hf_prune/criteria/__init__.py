"""Criteria: what a unit or a weight is worth. One file each; a new one is a file and a line in this table."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from hf_prune.criteria.base import Criterion

# name -> (module, class); imported when used, so that checking a recipe does not import PyTorch
_HOMES = {
    "l1": ("magnitude", "L1"),
    "l2": ("magnitude", "L2"),
    "random": ("random", "Random"),
    "gradient": ("gradient", "Gradient"),
    "taylor": ("taylor", "Taylor"),
    "activation": ("activation", "Activation"),
}


def get(name: str, options: Mapping[str, Any] | None = None) -> Criterion:
    """The criterion `name` with its options; both as a checked recipe has them."""
    module, class_name = _HOMES[name]
    return getattr(import_module(f"hf_prune.criteria.{module}"), class_name)(**(options or {}))
