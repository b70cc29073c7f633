"""The steps of a block's training: whole batches through the block, or single tokens through the module that learns.

The steps are the same for all processes, and each adds up what the processes find in their shares of it. So the result depends on
their number no more than a sum's rounding does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hf_prune.calibration.blocks import Chain, first_tensor
from hf_prune.calibration.recorders import at_least_float32
from hf_prune.calibration.reduction import as_first_rank, rank_and_world, sum_over_processes
from hf_prune.calibration.residual import find_tokenwise
from hf_prune.calibration.shelf import States
from hf_prune.calibration.walk import Walk
from hf_prune.planning.scratch import wanted_of


STEP_TOKENS = 1024
LEAST_SIZE = 1e-6  # of a token's |s|², in the mean's: a state of zeros would weigh without end

Share = list[tuple[int, Tensor]]  # by batch of this process, which of its tokens


class Minibatches(Protocol):
    """Steps, and what comes out in each."""

    def epoch(self, generator: torch.Generator) -> Sequence[Any]:
        """All of the data once, in random order, as steps."""

    def forward(self, step: Any) -> Tensor | None:
        """What comes out in this process's share of a step; None if it has none."""

    def loss(self, step: Any, output: Tensor) -> Tensor:
        """The relative errors of that, summed over its tokens."""


@dataclass(frozen=True)
class WholeBatches:
    """A step is a batch, through the whole block.

    Args:
        block: a scratch copy in evaluation mode.
        chain: its hidden states are what goes into the block at `position`.
        wanted: s, by batch of the chain.
        turns: of `calibration.batches.turns`.
    """

    block: nn.Module
    chain: Chain
    position: int
    wanted: States
    turns: Sequence[tuple[int, int]]

    def epoch(self, generator: torch.Generator) -> Sequence[tuple[int, int]]:
        return [self.turns[index] for index in torch.randperm(len(self.turns), generator=generator).tolist()]

    def forward(self, step: tuple[int, int]) -> Tensor | None:
        owner, number = step
        if owner != rank_and_world()[0]:
            return None
        return self.chain.calls[number][self.position](self.block, self.chain.hidden[number])

    def loss(self, step: tuple[int, int], output: Tensor) -> Tensor:
        return relative_error(self.chain, step[1], output, self.wanted[step[1]]).sum()


@dataclass(frozen=True)
class SingleTokens:
    """A step is about `STEP_TOKENS` tokens drawn from all of the data, through the one module that learns.

    Tokens of one text are correlated, so that their gradient is noisier; and what is in front of the module runs once. `of` makes one.

    Args:
        module: sees each token by itself.
        inputs: of the module, by batch, (n_tokens, d).
        targets: what it should put out, likewise, float32 or better.
        squared_norms: |s|², likewise, (n_tokens,).
        local_index: of each token of all processes its number here, -1 for those of others.
        n_steps: of an epoch.
    """

    module: nn.Module
    inputs: States
    targets: States
    squared_norms: list[Tensor]
    local_index: Tensor
    n_steps: int

    @classmethod
    def of(cls, whole: WholeBatches, name: str) -> SingleTokens | None:
        """The same for the module `name` alone; None if that is the whole block, and unless it sees each token by itself and the block
        ends with a sum with what it puts out.
        """
        block, chain, position = whole.block, whole.chain, whole.position
        if not name:
            return None
        junction = as_first_rank(lambda: find_tokenwise(block, chain.calls[0][position], chain.hidden[0], name))
        if junction is None:
            return None
        inputs, targets, squared_norms = chain.hidden.like(), chain.hidden.like(), []
        with Walk(chain, position, block, junction.sources) as going:  # as far as the module, which needn't run
            for number in range(len(chain.calls)):
                seen = going.until(number, junction.sources)
                wanted = at_least_float32(whole.wanted[number])
                inputs.append(chain.tokens(number, seen[name, "input"]))
                targets.append(wanted_of(chain, number, junction, seen, wanted, wanted.dtype))
                squared_norms.append(_squared_norms(chain.tokens(number, wanted)))
        counts = torch.zeros(len(whole.turns), dtype=torch.float64)
        mine = [turn for turn, (owner, _) in enumerate(whole.turns) if owner == rank_and_world()[0]]
        counts[mine] = torch.tensor([len(each) for each in squared_norms], dtype=torch.float64)
        sum_over_processes([counts])
        of_turn = torch.repeat_interleave(torch.arange(len(counts)), counts.long())
        is_own = torch.isin(of_turn, torch.tensor(mine, dtype=torch.long))
        local_index = torch.where(is_own, is_own.cumsum(0) - 1, -1)
        # short texts, in many batches, make no fewer steps than the batches would
        n_steps = min(len(of_turn), max(len(counts), round(len(of_turn) / STEP_TOKENS)))
        return cls(block.get_submodule(name), inputs, targets, squared_norms, local_index, n_steps)

    def epoch(self, generator: torch.Generator) -> Sequence[Share]:
        order = torch.randperm(len(self.local_index), generator=generator)
        starts = list(accumulate(map(len, self.squared_norms), initial=0))
        return [self._share(step, starts) for step in order.tensor_split(self.n_steps)]

    def _share(self, step: Tensor, starts: list[int]) -> Share:
        tokens = self.local_index[step]
        tokens = tokens[tokens >= 0].sort().values
        cuts = pairwise(torch.searchsorted(tokens, torch.tensor(starts)).tolist())
        return [(number, tokens[a:b] - starts[number]) for number, (a, b) in enumerate(cuts) if b > a]

    def forward(self, step: Share) -> Tensor | None:
        if not step:
            return None
        inputs = torch.cat([self.inputs.rows(number, rows) for number, rows in step])
        return first_tensor(self.module(inputs[:, None])).flatten(0, -2)

    def loss(self, step: Share, output: Tensor) -> Tensor:
        targets = torch.cat([self.targets.rows(number, rows) for number, rows in step])
        squared_norms = torch.cat([self.squared_norms[number][rows.to(output.device)] for number, rows in step])
        return ((output.to(targets.dtype) - targets).square().sum(1) / squared_norms).sum()


def relative_error(chain: Chain, number: int, hidden: Tensor, wanted: Tensor) -> Tensor:
    """|hidden - s|² / |s|² of each token of a batch that is no padding, (n_tokens,), float32 or better."""
    found, target = (at_least_float32(chain.tokens(number, each)) for each in (hidden, wanted))
    return (found - target).square().sum(1) / _squared_norms(target)


def _squared_norms(target: Tensor) -> Tensor:
    """|s|² of the tokens of a batch, (n_tokens,)."""
    size = target.square().sum(1)
    return size.clamp(min=LEAST_SIZE * float(size.mean()) + torch.finfo(size.dtype).tiny)


def mean_error(chain: Chain, wanted: States) -> float:
    """The mean relative error over the tokens of all processes."""
    sums = torch.zeros(2, dtype=torch.float64)
    for number in range(len(chain.calls)):
        errors = relative_error(chain, number, chain.hidden[number], wanted[number])
        sums += torch.tensor([float(errors.double().sum()), len(errors)], dtype=torch.float64)
    sum_over_processes([sums])
    return float(sums[0] / sums[1])
