"""How scores compare: between sites, and with a threshold."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def normalised(scores: Tensor, eligible: Tensor, step: Any, as_they_are: bool) -> Tensor:
    """A site's scores as they compete with those of other sites.

    Args:
        scores: float32.
        eligible: of the same shape; the others don't count.
        step: of the recipe: its `normalize`, and its threshold, which looks at raw scores.
        as_they_are: what `auto` means: the scores have a unit that all sites share, such as a change of the loss.

    Returns:
        Scores over the mean (or maximum) of their own absolute value, so that a site's width, the size of its inputs, or how
        a criterion sums doesn't decide which site loses more.
    """
    how = ("none" if as_they_are else "mean") if step.normalize == "auto" else step.normalize
    if how == "none" or step.threshold is not None or not eligible.any():
        return scores
    there = scores[eligible].abs().double()
    scale = there.mean() if how == "mean" else there.max()
    return (scores.double() / scale).float() if scale > 0 else scores


def cut_of(threshold: Any, values: Tensor) -> Tensor | float:
    """The score below which things leave; `values` are all that the rule looks at together."""
    if threshold.rule == "absolute":
        return threshold.value
    if threshold.rule == "relative_to_max":
        return threshold.value * values.max()
    return values.mean() - threshold.value * values.std(correction=0)
