"""Rewinding: once the last update is made, what is kept returns to the values that it had early in training."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hf_prune.apply.masks import enforce_
from hf_prune.errors import CheckpointError, RecipeError
from hf_prune.recipe import Recipe


class Rewinding:
    """The lottery ticket: the mask that training found, on weights of an early step (Frankle & Carbin 2019, arXiv 1803.03635:
    the first; Frankle et al. 2020, arXiv 1912.05671: step k).

    There the ticket is trained anew from step k, with a new optimizer. So are the moments here; the schedule of the learning
    rate goes on. All parameters that the optimizer trains return, those that no mask touches too.

    Args:
        recipe: whose schedule says to where, if to anywhere.
        n_steps: optimizer steps of the whole training.
        model: not wrapped.

    Raises:
        RecipeError: weights that a compensation refits would be thrown away.
    """

    def __init__(self, recipe: Recipe, n_steps: int, model: nn.Module):
        fraction = recipe.schedule.rewind
        self.step = None if fraction is None else round(fraction * n_steps)
        self.kept: dict[str, Tensor] = {}  # by parameter name, on the CPU
        if self.step is None:
            return
        repaired = [n for n, step in enumerate(recipe.prune) if step.compensation.name != "none"]
        if repaired:
            raise RecipeError(
                f"prune.{repaired[0]}.compensation refits weights, and schedule.rewind takes them back to what they were; drop one"
            )
        self.look(0, model)

    @torch.no_grad()
    def look(self, n_done: int, model: nn.Module) -> None:
        """Remember the weights, if this is the step to return to."""
        if n_done == self.step:
            trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
            self.kept = {name: parameter.detach().to("cpu", copy=True) for name, parameter in trained.items()}

    @torch.no_grad()
    def rewind_(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Put the remembered weights back, masked entries at zero, and forget both them and the optimizer's moments; nothing without `rewind`."""
        if self.step is None:
            return
        for name, value in self.kept.items():
            model.get_parameter(name).copy_(value)
        enforce_(model)
        optimizer.state.clear()
        self.kept = {}

    def load(self, kept: Mapping[str, Tensor], model: nn.Module) -> None:
        """Go on from what a checkpoint holds.

        Raises:
            CheckpointError: it is of another model.
        """
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        for name, value in kept.items():
            if shapes.get(name) != tuple(value.shape):
                raise CheckpointError(
                    f"the checkpoint would rewind {name} to shape {tuple(value.shape)}, and it is {shapes.get(name)} here. "
                    "Resume with the same model, or start anew."
                )
        self.kept = dict(kept)
