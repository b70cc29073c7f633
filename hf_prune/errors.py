"""The errors that the package raises on purpose; all derive from [`PruneError`]."""


class PruneError(Exception):
    """A user's mistake or a model's limit: the message names the value, what was expected and the remedy."""


class RecipeError(PruneError, ValueError):
    """A recipe that can't be accepted, or that can't be met on this model."""


class UnsupportedModelError(PruneError):
    """A model, or a part of it, that can't be pruned soundly for the asked target."""


class CalibrationError(PruneError):
    """Calibration data that is missing, too short, without the labels a criterion needs, or not finite."""


class VerificationError(PruneError):
    """The smaller model differs from the masked one by more than the tolerance."""


class CheckpointError(PruneError):
    """A checkpoint, plan or manifest that is damaged, incomplete, hostile or newer than this package reads."""
