"""A plan's new values on a live module, and its new biases: parameters that are not there yet."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from hf_prune.errors import PruneError


def require_fitting(model: nn.Module, values: Mapping[str, Tensor], added: Collection[str]) -> None:
    """Check that each of `values` has a parameter of its shape; those `added`, a linear layer without a bias, or theirs.

    Raises:
        PruneError: naming the first that has not.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in values.items():
        if name in parameters:
            fits = parameters[name].shape == tensor.shape
        else:
            fits = name in added and takes_bias(model, name) == tensor.numel()
        if not fits:
            raise PruneError(f"the plan replaces {name} {tuple(tensor.shape)}, which this model has not")


def takes_bias(model: nn.Module, name: str) -> int | None:
    """How long a bias of this name would be; None where it is no linear layer's, or that has one."""
    owner, _, own = name.rpartition(".")
    linear = dict(model.named_modules()).get(owner)
    lacks = own == "bias" and isinstance(linear, nn.Linear) and linear.bias is None
    return linear.out_features if lacks and isinstance(linear, nn.Linear) else None


@torch.no_grad()
def replace_(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Put `values` in place by parameter name; a bias that isn't there is made."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name, tensor in values.items():
        if name in parameters:
            parameters[name].copy_(tensor)
        else:
            add_bias_(module.get_submodule(name.rpartition(".")[0]), tensor)


def add_bias_(linear: nn.Module, value: Tensor | None = None) -> None:
    """Give a linear layer a bias of `value`, zeros if None; of its weight's device and dtype, trained if that is."""
    weight = linear.get_parameter("weight")
    bias = weight.new_zeros(weight.shape[0])
    if value is not None:
        bias.copy_(value)
    linear.register_parameter("bias", nn.Parameter(bias, requires_grad=weight.requires_grad))


def remove_biases_(module: nn.Module, names: Collection[str]) -> None:
    """Take added biases off again."""
    for name in names:
        module.get_submodule(name.rpartition(".")[0]).register_parameter("bias", None)
