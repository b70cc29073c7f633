"""What the data says: one pass over calibration batches."""

from hf_prune.calibration.collect import collect
from hf_prune.calibration.statistics import Statistics


__all__ = ["Statistics", "collect"]
