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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_prune.apply.masks import MaskedTensor
from hf_prune.calibration.blocks import Chain
from hf_prune.calibration.reduction import rank_and_world, sum_over_processes
from hf_prune.calibration.shelf import States


BETAS = 0.9, 0.99  # of Adam, for tens of steps
EPS = 1e-12  # of Adam: one weight of millions has a small gradient
LEAST_SIZE = 1e-6  # of a token's |s|², in the mean's: a state of zeros would weigh without end


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
    chain: Chain,
    position: int,
    wanted: States,
    turns: Sequence[tuple[int, int]],
    how: Reconstruction,
    masked: Sequence[tuple[MaskedTensor, Tensor]],
    seed: int,
) -> None:
    """Train `block` in place, a step for each turn. The caller has gradients disabled.

    The order of the turns is one for all processes, and each step's gradient is of one batch: the process whose it is hands it
    to the others. So the result depends on their number no more than a sum's rounding does.

    Args:
        block: a scratch copy in evaluation mode.
        names: of its parameters that learn.
        chain: its hidden states are what goes into the block at `position`.
        wanted: s, by batch of the chain.
        turns: of `calibration.batches.turns`.
        how: epochs and learning rate.
        masked: what stays zero, with its parameters.
        seed: of a private random state, for the order.
    """
    block.requires_grad_(False)
    parameters = [block.get_parameter(name).requires_grad_() for name in names]
    # a step in bfloat16 would mostly be rounded away
    masters = [parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32)) for parameter in parameters]
    lengths = [how.learning_rate * float(master.square().mean().sqrt()) for master in masters]
    groups = [{"params": [master], "lr": length} for master, length in zip(masters, lengths, strict=True)]
    optimizer = torch.optim.Adam(groups, betas=BETAS, eps=EPS)
    rank, _ = rank_and_world()
    gradients = [torch.zeros_like(master) for master in masters]
    for master, gradient in zip(masters, gradients, strict=True):
        master.grad = gradient
    n_steps = how.epochs * len(turns)
    for step, (owner, number) in enumerate(_in_random_order(turns, how.epochs, seed)):
        for gradient in gradients:
            gradient.zero_()
        if owner == rank:
            _backward(block, parameters, gradients, chain, number, position, wanted[number])
        sum_over_processes(gradients)  # one is the owner's, the others are zeros
        for group, length in zip(optimizer.param_groups, lengths, strict=True):
            group["lr"] = length * (1 + math.cos(math.pi * step / n_steps)) / 2
        optimizer.step()
        for parameter, master in zip(parameters, masters, strict=True):
            parameter.detach().copy_(master)
        for entry, parameter in masked:
            entry.zero_(parameter.detach())
    block.requires_grad_(False)


def _backward(
    block: nn.Module,
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    chain: Chain,
    number: int,
    position: int,
    wanted: Tensor,
) -> None:
    """Put into `gradients`, zeros so far, those of the sum over the tokens of one batch, of whose scale Adam knows nothing.

    They pass the block in units of the largest at its output: float16 has no room for smaller numbers.
    """
    with torch.enable_grad():
        hidden = chain.calls[number][position](block, chain.hidden[number])
        end = hidden.detach().to(torch.promote_types(hidden.dtype, torch.float32)).requires_grad_()
        (at_end,) = torch.autograd.grad(relative_error(chain, number, end, wanted).sum(), end)
    size = float(at_end.abs().max())
    if not (hidden.requires_grad and size):  # an expert that nothing in this batch was sent to
        return
    found = torch.autograd.grad(hidden, parameters, (at_end / size).to(hidden.dtype), allow_unused=True)
    for gradient, each in zip(gradients, found, strict=True):
        if each is not None:
            gradient.copy_(each).mul_(size)


def relative_error(chain: Chain, number: int, hidden: Tensor, wanted: Tensor) -> Tensor:
    """|hidden - s|² / |s|² of each token of a batch that is no padding, (n_tokens,), float32 or better."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    target = chain.tokens(number, wanted).to(wide)
    left = (chain.tokens(number, hidden).to(wide) - target).square().sum(1)
    size = target.square().sum(1)
    return left / size.clamp(min=LEAST_SIZE * float(size.mean()) + torch.finfo(wide).tiny)


def mean_error(chain: Chain, wanted: States) -> float:
    """The mean relative error over the tokens of all processes."""
    sums = torch.zeros(2, dtype=torch.float64)
    for number in range(len(chain.calls)):
        errors = relative_error(chain, number, chain.hidden[number], wanted[number])
        sums += torch.tensor([float(errors.double().sum()), len(errors)], dtype=torch.float64)
    sum_over_processes([sums])
    return float(sums[0] / sums[1])


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


def _in_random_order(turns: Sequence[tuple[int, int]], epochs: int, seed: int) -> Iterator[tuple[int, int]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for index in torch.randperm(len(turns), generator=generator).tolist():
            yield turns[index]
