"""Block-wise reconstruction: what is left of a block learns to put out what the dense model's block does.

For weights θ of a block it descends on the mean over tokens of

    |f_θ(x) - s|² / |s|²

x what the pruned and repaired blocks before it put out, s what the dense model has behind it (EBFT, Guo et al. 2024,
arXiv 2402.12419, for masked weights; BRECQ, Li et al. 2021, arXiv 2102.05426, for quantised ones). Divided by |s|², since norms divide
what later blocks read by it. No labels and no pass through the whole model: one block at a time.

Adam's steps are in units of each parameter's own root mean square, as Adafactor's (Shazeer & Stern 2018, section 8).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.apply.masks import MaskedTensor
from hf_prune.calibration.recorders import at_least_float32
from hf_prune.calibration.reduction import sum_over_processes
from hf_prune.planning.minibatches import Minibatches, SingleTokens, WholeBatches


BETAS = 0.9, 0.99  # of Adam, for tens of steps
EPS = 1e-12  # of Adam: one weight of millions has a small gradient


@dataclass(frozen=True, order=True)
class Reconstruction:
    """How often the calibration data are gone through, and the first step's length, in units of a parameter's root mean square;
    it falls to zero along a half cosine.
    """

    epochs: int
    learning_rate: float


def reconstruct_(
    block: nn.Module,
    names: Sequence[str],
    whole: WholeBatches,
    how: Reconstruction,
    narrowed: AbstractContextManager[Sequence[tuple[MaskedTensor, Tensor]]],
    seed: int,
) -> None:
    """Train `block` in place, in steps of tokens from all of the data where what learns is one module that allows it, else batch by
    batch. The caller has gradients disabled.

    Args:
        block: a scratch copy in evaluation mode.
        names: of its parameters that learn.
        whole: the data, for the whole block.
        how: epochs and learning rate.
        narrowed: in which the block is without what it can do without; gives what else stays zero, with its parameters.
        seed: of a private random state, for the order.
    """
    # of whole parameters, with the zeros that leave
    lengths = [
        how.learning_rate * float(at_least_float32(block.get_parameter(name)).square().mean().sqrt()) for name in names
    ]
    with narrowed as masked:
        _descend_(block, names, whole, how.epochs, lengths, masked, torch.Generator().manual_seed(seed))


def _descend_(
    block: nn.Module,
    names: Sequence[str],
    whole: WholeBatches,
    epochs: int,
    lengths: Sequence[float],
    masked: Sequence[tuple[MaskedTensor, Tensor]],
    generator: torch.Generator,
) -> None:
    block.requires_grad_(False)
    minibatches = SingleTokens.of(whole, _innermost(names)) or whole
    parameters = [block.get_parameter(name).requires_grad_() for name in names]
    # a step in bfloat16 would mostly be rounded away
    masters = [at_least_float32(parameter.detach()) for parameter in parameters]
    groups = [{"params": [master], "lr": length} for master, length in zip(masters, lengths, strict=True)]
    optimizer = torch.optim.Adam(groups, betas=BETAS, eps=EPS)
    gradients = [torch.zeros_like(master) for master in masters]
    for master, gradient in zip(masters, gradients, strict=True):
        master.grad = gradient
    steps = [step for _ in range(epochs) for step in minibatches.epoch(generator)]
    for n_done, step in enumerate(steps):
        for gradient in gradients:
            gradient.zero_()
        _backward(parameters, gradients, minibatches, step)
        sum_over_processes(gradients)
        for group, length in zip(optimizer.param_groups, lengths, strict=True):
            group["lr"] = length * (1 + math.cos(math.pi * n_done / len(steps))) / 2
        optimizer.step()
        for parameter, master in zip(parameters, masters, strict=True):
            parameter.detach().copy_(master)
        for entry, parameter in masked:
            entry.zero_(parameter.detach())
    block.requires_grad_(False)


def _backward(parameters: Sequence[Tensor], gradients: Sequence[Tensor], minibatches: Minibatches, step: Any) -> None:
    """Put into `gradients`, zeros so far, those of the sum over this process's tokens of a step, of whose scale Adam knows nothing.

    They pass the block in units of the largest at its output: float16 has no room for smaller numbers.
    """
    with torch.enable_grad():
        output = minibatches.forward(step)
        if output is None:
            return
        end = at_least_float32(output.detach()).requires_grad_()
        (at_end,) = torch.autograd.grad(minibatches.loss(step, end), end)
    size = float(at_end.abs().max())
    if not (output.requires_grad and size):  # an expert that nothing in this batch was sent to
        return
    found = torch.autograd.grad(output, parameters, (at_end / size).to(output.dtype), allow_unused=True)
    for gradient, each in zip(gradients, found, strict=True):
        if each is not None:
            gradient.copy_(each).mul_(size)


def learning_parameters(model: nn.Module, block: str, scratch: nn.Module) -> list[str]:
    """The names of the floating-point parameters of `scratch`, a copy of the module `block`, which nothing else in `model` uses and
    which are no embedding's.
    """
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    live = dict(model.get_submodule(block).named_parameters(remove_duplicate=False))
    # T5's first block makes the position bias of all
    embeddings = tuple(f"{name}." for name, module in scratch.named_modules() if isinstance(module, nn.Embedding))
    return [
        name
        for name, parameter in scratch.named_parameters()
        if parameter.is_floating_point() and uses[id(live.get(name))] <= 1 and not name.startswith(embeddings)
    ]


def _innermost(names: Sequence[str]) -> str:
    """The module that has all these parameters; the block itself is ""."""
    levels = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return ".".join(level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels))
