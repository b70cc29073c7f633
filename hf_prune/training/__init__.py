"""Pruning while training."""

from hf_prune.training.callback import PruningCallback
from hf_prune.training.pruner import Pruner
from hf_prune.training.trainer import PruningMixin, PruningSeq2SeqTrainer, PruningTrainer


__all__ = ["Pruner", "PruningCallback", "PruningMixin", "PruningSeq2SeqTrainer", "PruningTrainer"]
