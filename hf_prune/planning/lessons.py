"""What a block learns from: the calibration data in steps, of whole batches or of single tokens.

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

from hf_prune.calibration.blocks import Chain, first_tensor, recorded
from hf_prune.calibration.reduction import as_first_rank, rank_and_world, sum_over_processes
from hf_prune.calibration.residual import Junction, find_tokenwise
from hf_prune.calibration.shelf import States
from hf_prune.planning.scratch import wanted_of


STEP_TOKENS = 1024
LEAST_SIZE = 1e-6  # of a token's |s|², in the mean's: a state of zeros would weigh without end


class Lessons(Protocol):
    """Steps, and what comes out in each."""

    def epoch(self, generator: torch.Generator) -> Sequence[Any]:
        """All of the data once, in random order, as steps."""

    def put_out(self, step: Any) -> Tensor | None:
        """What comes out in this process's share of a step; None if it has none."""

    def error(self, step: Any, put_out: Tensor) -> Tensor:
        """The relative errors of that, summed over its tokens."""


@dataclass(frozen=True)
class Batchwise:
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

    def put_out(self, step: tuple[int, int]) -> Tensor | None:
        owner, number = step
        if owner != rank_and_world()[0]:
            return None
        return self.chain.calls[number][self.position](self.block, self.chain.hidden[number])

    def error(self, step: tuple[int, int], put_out: Tensor) -> Tensor:
        return relative_error(self.chain, step[1], put_out, self.wanted[step[1]]).sum()


@dataclass(frozen=True)
class Tokenwise:
    """A step is `STEP_TOKENS` tokens from anywhere in the data, through the one module that learns.

    The tokens of one text have much in common, so that their gradient says less of the whole; and what is in front of the module
    runs once. `of` makes one.

    Args:
        module: sees each token by itself.
        inputs: of the module, by batch, (n_tokens, d).
        goals: what it should put out, likewise.
        sizes: |s|², likewise, (n_tokens,).
        own: of each token of all processes its number here, -1 for those of others.
    """

    module: nn.Module
    inputs: States
    goals: States
    sizes: list[Tensor]
    own: Tensor

    @classmethod
    def of(cls, lessons: Batchwise, name: str) -> Tokenwise | None:
        """The same for the module `name` alone; None if that is the whole block, and unless it sees each token by itself and the block
        ends with a sum with what it puts out.
        """
        block, chain, position = lessons.block, lessons.chain, lessons.position

        def find() -> Junction | None:
            return find_tokenwise(block, chain.calls[0][position], chain.hidden[0], name) if name else None

        junction = as_first_rank(find)
        if junction is None:
            return None
        inputs, goals, sizes = chain.hidden.like(), chain.hidden.like(), []
        for number, calls in enumerate(chain.calls):
            with recorded(block, junction.sources) as seen:
                hidden = calls[position](block, chain.hidden[number])
            wide = torch.promote_types(hidden.dtype, torch.float32)
            inputs.append(chain.tokens(number, seen[name, "input"]))
            goals.append(wanted_of(chain, number, junction, seen, lessons.wanted[number], wide))
            sizes.append(_sizes(chain.tokens(number, lessons.wanted[number]).to(wide)))
        counts = torch.zeros(len(lessons.turns), dtype=torch.float64)
        mine = [turn for turn, (owner, _) in enumerate(lessons.turns) if owner == rank_and_world()[0]]
        counts[mine] = torch.tensor([len(each) for each in sizes], dtype=torch.float64)
        sum_over_processes([counts])
        of_turn = torch.repeat_interleave(torch.arange(len(counts)), counts.long())
        is_own = torch.isin(of_turn, torch.tensor(mine, dtype=torch.long))
        own = torch.where(is_own, is_own.cumsum(0) - 1, -1)
        return cls(block.get_submodule(name), inputs, goals, sizes, own)

    def epoch(self, generator: torch.Generator) -> Sequence[Tensor]:
        n_steps = max(1, round(len(self.own) / STEP_TOKENS))
        return torch.randperm(len(self.own), generator=generator).tensor_split(n_steps)

    def put_out(self, step: Tensor) -> Tensor | None:
        share = self._share(step)
        if not share:
            return None
        inputs = torch.cat([self.inputs[number][rows] for number, rows in share])
        return first_tensor(self.module(inputs[None])).flatten(0, -2)

    def error(self, step: Tensor, put_out: Tensor) -> Tensor:
        share = self._share(step)
        goals = torch.cat([self.goals[number][rows] for number, rows in share])
        sizes = torch.cat([self.sizes[number][rows] for number, rows in share])
        return ((put_out.to(goals.dtype) - goals).square().sum(1) / sizes).sum()

    def _share(self, step: Tensor) -> list[tuple[int, Tensor]]:
        """The tokens of a step that are this process's: (batch, rows of it)."""
        tokens = self.own[step]
        tokens = tokens[tokens >= 0].sort().values
        starts = list(accumulate(map(len, self.sizes), initial=0))
        cuts = torch.searchsorted(tokens, torch.tensor(starts)).tolist()
        device = self.sizes[0].device if self.sizes else None
        return [
            (number, (tokens[first:last] - starts[number]).to(device))
            for number, (first, last) in enumerate(pairwise(cuts))
            if last > first
        ]


def relative_error(chain: Chain, number: int, hidden: Tensor, wanted: Tensor) -> Tensor:
    """|hidden - s|² / |s|² of each token of a batch that is no padding, (n_tokens,), float32 or better."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    target = chain.tokens(number, wanted).to(wide)
    return (chain.tokens(number, hidden).to(wide) - target).square().sum(1) / _sizes(target)


def _sizes(target: Tensor) -> Tensor:
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
