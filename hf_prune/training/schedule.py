"""When sparsity grows: from a schedule in fractions of training to updates at optimizer steps."""

from __future__ import annotations

from hf_prune.recipe import Recipe, Schedule


def first_step(recipe: Recipe, n_steps: int) -> int:
    """The optimizer step where the earliest schedule of `recipe` begins: 0 is before the first."""
    return min(round((step.schedule or recipe.schedule).begin * n_steps) for step in recipe.prune)


def updates(schedule: Schedule, n_steps: int) -> dict[int, float]:
    """After which optimizer step (from 1) to prune, and how much of the final sparsity to reach there.

    linear: progress t; cubic: 1 - (1 - t)^3 (Zhu & Gupta 2017, equation 1, from no sparsity), t in (0, 1] between
    `begin` and `end`; constant: 1 at `begin` and at each update up to `end`; one_shot: 1, once, at `begin`.

    Args:
        schedule: of a recipe.
        n_steps: optimizer steps of the whole training.

    Returns:
        step -> progress, ascending; fewer than `schedule.updates` where training is too short for as many.

    Raises:
        ValueError: `n_steps` is below 1.
    """
    if n_steps < 1:
        raise ValueError(f"n_steps is {n_steps}; expected the number of optimizer steps of the training, at least 1")
    begin, end = schedule.begin * n_steps, schedule.end * n_steps

    def at(step: float) -> int:
        return min(max(1, round(step)), n_steps)

    if schedule.name == "one_shot":
        return {at(begin): 1.0}
    fractions = [k / schedule.updates for k in range(1, schedule.updates + 1)]
    if schedule.name == "constant":
        return {at(begin + (end - begin) * t): 1.0 for t in [0.0, *fractions]}
    ramp = {"linear": lambda t: t, "cubic": lambda t: 1 - (1 - t) ** 3}[schedule.name]
    return {at(begin + (end - begin) * t): ramp(t) for t in fractions}
