"""The names that a recipe may use for criteria. Data only: a recipe is checked against it before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


EVERY_TARGET = frozenset({"weights", "ffn_neurons", "attention_heads", "layers", "experts"})
UNITS = EVERY_TARGET - {"weights"}


class CriterionEntry(NamedTuple):
    """Where a criterion lives, the targets that it is defined for, its options in a recipe, who competes if a step
    doesn't say, and how it goes about it."""

    module: str  # in hf_prune.criteria; imported when used, so that checking a recipe doesn't import PyTorch
    class_name: str
    targets: frozenset[str] = EVERY_TARGET
    options: Mapping[str, str] = MappingProxyType({})  # name -> type in the words of JSON Schema, or "criteria"
    required: frozenset[str] = frozenset()  # options without a default
    scope: str = "layer"
    is_blockwise: bool = False  # chooses and updates together, matrix by matrix
    # has to know how many leave each site; with an option `greedy` if that is true, which it is for layers if not given
    is_greedy: bool = False
    same_unit: bool = False  # scores of weights have a unit that all matrices share, so that they compare as they are
    of_parts: bool = True  # of layers, where it is for them
    by_threshold: bool = False  # says how much leaves by a threshold on its scores, and by nothing else


# A new criterion is a file in hf_prune/criteria and a line here.
CRITERIA = {
    "l1": CriterionEntry("magnitude", "L1", same_unit=True),
    "l2": CriterionEntry("magnitude", "L2", same_unit=True),
    "random": CriterionEntry("random", "Random", options={"seed": "integer"}),
    "gradient": CriterionEntry("gradient", "Gradient", targets=EVERY_TARGET - {"experts"}),
    "taylor": CriterionEntry("taylor", "Taylor", targets=EVERY_TARGET - {"experts"}),
    "activation": CriterionEntry("activation", "Activation", targets=UNITS),
    "fluctuation": CriterionEntry("fluctuation", "Fluctuation", targets=UNITS - {"layers", "experts"}),
    "apoz": CriterionEntry("apoz", "Apoz", targets=frozenset({"ffn_neurons"})),
    "fisher": CriterionEntry(
        "fisher",
        "Fisher",
        targets=UNITS - {"experts"},
        options={"per_token": "boolean", "samples": "integer", "labels": "string"},
    ),
    "loss_change": CriterionEntry(
        "loss_change",
        "LossChange",
        targets=UNITS,
        options={"greedy": "boolean", "samples": "integer"},
        is_greedy=True,
    ),
    "routing": CriterionEntry("routing", "Routing", targets=frozenset({"experts"})),
    "block_influence": CriterionEntry("block_influence", "BlockInfluence", targets=frozenset({"layers"})),
    "angular": CriterionEntry("angular", "Angular", targets=frozenset({"layers"}), is_greedy=True, of_parts=False),
    "wanda": CriterionEntry("wanda", "Wanda", targets=frozenset({"weights"}), scope="output"),
    "ria": CriterionEntry("wanda", "Ria", targets=frozenset({"weights"}), options={"power": "number"}),
    "sparsegpt": CriterionEntry(
        "sparsegpt",
        "SparseGPT",
        targets=frozenset({"weights"}),
        options={
            "block": "integer",
            "damping": "number",
            "refine": "integer",
            "swaps": "integer",
            "dense_target": "boolean",
        },
        is_blockwise=True,
    ),
    "greedy": CriterionEntry(
        "greedy",
        "Greedy",
        targets=frozenset({"ffn_neurons", "attention_heads"}),
        options={"damping": "number", "dense_target": "boolean"},
        is_greedy=True,
    ),
    "combined": CriterionEntry("combined", "Combined", options={"of": "criteria"}, required=frozenset({"of"})),
    "movement": CriterionEntry("movement", "Movement", targets=EVERY_TARGET - {"layers", "experts"}),
    "soft_movement": CriterionEntry(
        "movement", "SoftMovement", targets=EVERY_TARGET - {"layers", "experts"}, by_threshold=True
    ),
}
# those that score each unit or weight of a site by itself, whatever happens to the others
COMBINABLE = [
    name
    for name, entry in CRITERIA.items()
    if not (entry.is_blockwise or entry.is_greedy or entry.by_threshold or "of" in entry.options)
]


class CompensationEntry(NamedTuple):
    """What a repair is for, and its options in a recipe."""

    targets: frozenset[str]
    options: Mapping[str, str] = MappingProxyType({})
    of_parts: bool = True  # of layers, where it is for them


COMPENSATIONS = {
    "bias": CompensationEntry(frozenset({"ffn_neurons", "attention_heads"}), options={"add": "boolean"}),
    "least_squares": CompensationEntry(UNITS - {"experts"}, options={"add": "boolean"}),
    "linear": CompensationEntry(frozenset({"layers"}), of_parts=False),
    "reconstruct": CompensationEntry(
        EVERY_TARGET - {"experts"}, options={"add": "boolean", "epochs": "count", "learning_rate": "positive"}
    ),
}


class AllocationEntry(NamedTuple):
    """Where an allocation lives, what it is for, its options in a recipe, and with whom units then compete."""

    module: str  # in hf_prune.allocation; imported when used
    class_name: str
    targets: frozenset[str] = EVERY_TARGET
    options: Mapping[str, str] = MappingProxyType({})
    required: frozenset[str] = frozenset()  # options without a default
    scopes: frozenset[str] = frozenset({"output", "layer"})


# Beside these a recipe may give shares by glob. A new allocation is a file in hf_prune/allocation and a line here.
ALLOCATIONS = {
    "kind": AllocationEntry("kind", "ByKind", scopes=frozenset({"global"})),
    "owl": AllocationEntry(
        "owl", "Owl", targets=frozenset({"weights"}), options={"multiple": "number", "spread": "number"}
    ),
    "sensitivity": AllocationEntry(
        "sensitivity", "BySensitivity", options={"file": "string"}, required=frozenset({"file"})
    ),
}
