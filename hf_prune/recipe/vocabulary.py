"""The names that a recipe may use for criteria. Data only: a recipe is checked against it before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


EVERY_TARGET = frozenset({"weights", "ffn_neurons", "attention_heads", "layers"})


class CriterionEntry(NamedTuple):
    """Where a criterion lives, the targets that it is defined for, and the options that it takes in a recipe."""

    module: str  # in hf_prune.criteria; imported when used, so that checking a recipe doesn't import PyTorch
    class_name: str
    targets: frozenset[str] = EVERY_TARGET
    options: Mapping[str, str] = MappingProxyType({})  # name -> type in the words of JSON Schema


# A new criterion is a file in hf_prune/criteria and a line here.
CRITERIA = {
    "l1": CriterionEntry("magnitude", "L1"),
    "l2": CriterionEntry("magnitude", "L2"),
    "random": CriterionEntry("random", "Random", options={"seed": "integer"}),
    "gradient": CriterionEntry("gradient", "Gradient"),
    "taylor": CriterionEntry("taylor", "Taylor"),
    "activation": CriterionEntry("activation", "Activation", targets=EVERY_TARGET - {"weights"}),
}

# What the language has names for and this version has not.
LATER_CRITERIA = frozenset(
    {
        "angular", "apoz", "block_influence", "combined", "fisher", "fluctuation", "greedy", "loss_change", "movement",
        "ria", "soft_movement", "sparsegpt", "wanda",
    }
)  # fmt: skip
