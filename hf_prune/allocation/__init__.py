"""From scores to keep-masks: how much leaves where."""

from hf_prune.allocation.choice import Choice, select_sites
from hf_prune.allocation.units import choose_units
from hf_prune.allocation.weights import choose_weights


__all__ = ["Choice", "choose_units", "choose_weights", "select_sites"]
