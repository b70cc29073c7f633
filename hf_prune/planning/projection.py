"""Refit of one output projection, in place: what of its weight and bias may change, and how it comes back into them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_prune.apply.replace import add_bias_, remove_biases_
from hf_prune.calibration.reduction import raise_together
from hf_prune.compensation.least_squares import Moments, reduce_, refit
from hf_prune.errors import CalibrationError, RecipeError
from hf_prune.planning.scratch import Linear


@dataclass(frozen=True)
class Refitted:
    """What became of it."""

    values: dict[str, Tensor]  # its new tensors by name
    ridge: float | None  # the one chosen; None where no change did better
    n_tokens: int  # with those held out
    has_new_bias: bool


def refit_projection_(
    name: str,
    module: nn.Module,
    there: Tensor,
    rows: Iterable[tuple[bool, Tensor, Tensor]],
    *,
    only_bias: bool = False,
    may_add: bool = False,
) -> Refitted:
    """Refit a projection so that it puts out what it should. The caller has gradients disabled.

    Args:
        name: in the model, for messages.
        module: of a scratch copy.
        there: bool (d_out, d_in); the other entries stay zero; columns without any True keep their weights.
        rows: by batch whether it is held out to choose the ridge, the inputs (n_tokens, d_in), and what should come out, bias
            and all (n_tokens, d_out).
        only_bias: leave the weight as it is.
        may_add: give it a bias where it has none.

    Raises:
        CalibrationError: numbers that are not finite, or other tokens than in the dense model.
        RecipeError: it has no bias to take the change.
    """
    is_new = getattr(module, "bias", None) is None and may_add
    if is_new:
        add_bias_(module)
    linear = Linear.of(module)
    weight, bias, matrix = linear.weight, linear.bias, linear.matrix
    if only_bias and bias is None:
        raise RecipeError(
            f"compensation bias: {name} has no bias to take what left; use least_squares, "
            "{name: bias, add: true}, which gives it one, or exclude it"
        )
    d_out, d_in = matrix.shape
    columns = torch.nonzero(there.any(0)).reshape(-1)[: 0 if only_bias else d_in]
    may_change = torch.cat([there[:, columns], there.new_ones(d_out, int(bias is not None))], 1)
    moments = [Moments.zeros(may_change.shape[1], d_out, weight.device) for _ in range(2)]
    error = None
    for is_held_out, inputs, outputs in rows:
        if len(inputs) != len(outputs):
            error = CalibrationError(
                f"{name} can't be refitted: the pruned model sends it other tokens than the dense model does, as routers do "
                "to experts; exclude it, or use compensation none"
            )
            break
        if only_bias:
            outputs = outputs - inputs @ matrix.T.to(inputs.dtype)
        inputs = inputs[:, columns]
        if bias is not None:
            inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)
        moments[is_held_out].add_(inputs, outputs)
    raise_together(error)
    reduce_(moments, name)
    now = torch.cat([matrix[:, columns], *([] if bias is None else [bias[:, None]])], 1)
    fit, test = (each.lacking(now) for each in moments)
    index = torch.nonzero(fit.gram.diagonal() + test.gram.diagonal() > 0).reshape(-1)  # of those that fire
    fit, test = fit.at(index), test.at(index)
    n_tokens = fit.n_tokens + test.n_tokens
    # the mean of what left takes no ridge
    fitted, tested = (fit + test, None) if only_bias or not test.n_tokens else (fit, test)
    found = refit(fitted, tested, n_free=int(bias is not None), may_change=may_change[:, index])
    ridge = 0.0 if only_bias else found.ridge
    if is_new and ridge is None:
        remove_biases_(module, ["bias"])  # where no change does better it would be zeros
        bias = None
    change = found.change.new_zeros(may_change.shape)
    change[:, index] = found.change
    values = {}
    if not only_bias:
        matrix[:, columns] = (matrix[:, columns].double() + change[:, : len(columns)]).to(matrix.dtype)
        values["weight"] = weight.detach().cpu().clone()
    if bias is not None:
        bias.copy_(bias.double() + change[:, -1])
        values["bias"] = bias.detach().cpu().clone()
    return Refitted(values, ridge, n_tokens, is_new and bias is not None)
