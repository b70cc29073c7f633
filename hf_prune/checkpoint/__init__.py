"""Pruned checkpoints: what the config says, how they are saved and loaded."""

from hf_prune.checkpoint.hooks import install
from hf_prune.checkpoint.saving import ARTIFACTS, MARKER, is_complete
from hf_prune.checkpoint.settle import Verdict, allowed_sizes, in_place, settle_config_


__all__ = ["ARTIFACTS", "MARKER", "Verdict", "allowed_sizes", "in_place", "install", "is_complete", "settle_config_"]
