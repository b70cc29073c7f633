"""From a model to what can leave it."""

from hf_prune.structure.discovery import inspect_model, require_sites, stacks_of
from hf_prune.structure.layouts import AttentionLayout, FeedForwardLayout, register_layout
from hf_prune.structure.sites import ModelStructure, Site, TensorSlice, WeightSite


__all__ = [
    *("AttentionLayout", "FeedForwardLayout", "ModelStructure", "Site", "TensorSlice", "WeightSite", "inspect_model"),
    *("register_layout", "require_sites", "stacks_of"),
]
