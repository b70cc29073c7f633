"""Reports and model cards."""

from hf_prune.report.report import PruningReport


__all__ = ["PruningReport"]
