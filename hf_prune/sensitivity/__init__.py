"""Sensitivity: loss against sparsity, site by site, measured."""

from hf_prune.sensitivity.curves import Curve, Sensitivity
from hf_prune.sensitivity.scan import DEFAULT_SPARSITIES, scan


__all__ = ["DEFAULT_SPARSITIES", "Curve", "Sensitivity", "scan"]
