"""Weight, neuron and structured pruning for Transformers models. What PEFT is to adapters, this is to pruning.

Importing it is cheap: names are looked up when first used. It also lets Transformers load and save pruned checkpoints.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_prune import after_import


if TYPE_CHECKING:
    from hf_prune.errors import (
        CalibrationError,
        CheckpointError,
        PruneError,
        RecipeError,
        UnsupportedModelError,
        VerificationError,
    )
    from hf_prune.pipeline import apply_, prune_, shrink_
    from hf_prune.plan import PruningPlan
    from hf_prune.planning import make_plan
    from hf_prune.recipe import Recipe
    from hf_prune.report import PruningReport
    from hf_prune.structure import AttentionLayout, FeedForwardLayout, inspect_model, register_layout
    from hf_prune.training import Pruner, PruningCallback, PruningMixin, PruningSeq2SeqTrainer, PruningTrainer

__version__ = "0.1.0"

_HOMES = {
    "hf_prune.errors": (
        "CalibrationError",
        "CheckpointError",
        "PruneError",
        "RecipeError",
        "UnsupportedModelError",
        "VerificationError",
    ),
    "hf_prune.pipeline": ("apply_", "prune_", "shrink_"),
    "hf_prune.plan": ("PruningPlan",),
    "hf_prune.planning": ("make_plan",),
    "hf_prune.recipe": ("Recipe",),
    "hf_prune.report": ("PruningReport",),
    "hf_prune.structure": ("AttentionLayout", "FeedForwardLayout", "inspect_model", "register_layout"),
    "hf_prune.training": (
        "Pruner",
        "PruningCallback",
        "PruningMixin",
        "PruningSeq2SeqTrainer",
        "PruningTrainer",
    ),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [*sorted(_HOME_OF), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


def _install() -> None:
    for hooks in ("hf_prune.checkpoint.hooks", "hf_prune.hub.hooks"):
        import_module(hooks).install()


# Pruned checkpoints load as soon as this package is imported. The hook waits for Transformers' model code, which
# costs seconds to import and which a program may never need.
after_import.call("transformers.modeling_utils", _install)
after_import.call("transformers.trainer", lambda: import_module("hf_prune.hub.hooks").install_trainer())
