"""Angular distance: the run of layers that turns what goes through it least leaves together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from hf_prune.calibration.batches import Batch, dealt, decoder_modules
from hf_prune.calibration.blocks import BlockCall, first_tensor
from hf_prune.calibration.collect import evaluation
from hf_prune.calibration.reduction import raise_together, sum_over_processes
from hf_prune.calibration.statistics import Statistics
from hf_prune.criteria.base import no_weights
from hf_prune.errors import CalibrationError, RecipeError
from hf_prune.structure.sites import Site, Target, WeightSite


@dataclass(frozen=True)
class Angular:
    """(1/π) arccos of the cosine between what goes into a run of n consecutive layers and what comes out of it, n being as many
    as are to leave: the run with the least leaves (Gromov et al. 2024, The Unreasonable Ineffectiveness of the Deeper Layers).

    There the angle is that of a sequence's last token, here the mean over all tokens but padding: a short calibration set
    has few last tokens, and of an encoder no token is the one that matters. A layer's score is the least angle of a run
    that it is in, so that the n lowest are such a run. Layers that left before are passed over: a run is of those there.
    """

    loss_units: ClassVar[bool] = False

    def needs(self, target: Target) -> frozenset[str]:
        return frozenset()

    def score_units(self, model: nn.Module, site: Site, statistics: Statistics | None) -> Tensor:
        raise AssertionError("angular looks at runs of layers; see `rank_units`")

    def score_weights(self, model: nn.Module, site: WeightSite, statistics: Statistics | None) -> Tensor:
        raise no_weights("angular")

    def rank_units(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        batches: Sequence[Mapping[str, Any]],
        n_removed: Mapping[str, int],
        there: Mapping[str, Tensor],
        seed: int,
    ) -> dict[str, Tensor]:
        """Scores by site key, float32 (n_units,): the least angle, in [0, 1], of a run that the layer is in; 0 of what is gone.

        Raises:
            CalibrationError: hidden states are not finite.
        """
        runs = {site.key: _runs(site, there[site.key], n_removed[site.key]) for site in sites}
        sums = {key: torch.zeros(len(of_site) + 1, dtype=torch.float64) for key, of_site in runs.items()}  # and tokens
        error: CalibrationError | None = None
        with evaluation(model, seed), torch.no_grad():
            try:
                for batch in dealt(batches, next(model.parameters()).device):
                    with _angles(model, sites, runs, batch, sums):
                        model(**batch.inputs)
                    _require_finite(sums, batch)
            except CalibrationError as caught:
                error = caught
        raise_together(error)
        sum_over_processes(sums.values())
        scores = {}
        for site in sites:
            mean = (sums[site.key][:-1] / sums[site.key][-1].clamp(min=1)).tolist()
            scores[site.key] = torch.tensor(
                [
                    min((angle for run, angle in zip(runs[site.key], mean, strict=True) if unit in run), default=0.0)
                    for unit in range(site.n_units)
                ]
            )
        return scores


def _runs(site: Site, there: Tensor, n_removed: int) -> list[list[int]]:
    """The runs of `n_removed` (at least one) consecutive layers among those that are there, none across one that has to stay.

    Raises:
        RecipeError: no run is as long.
    """
    units = torch.nonzero(there).reshape(-1).tolist()
    length = min(max(1, n_removed), len(units))
    runs = [units[start : start + length] for start in range(len(units) - length + 1)]
    runs = [run for run in runs if not any(run[0] < number < run[-1] for number, _ in site.fixed)]
    if not runs:
        raise RecipeError(
            f"criterion angular: no {length} consecutive layers of {site.name} can leave, since "
            f"{', '.join(str(number) for number, _ in site.fixed)} have to stay; ask for fewer, or take block_influence"
        )
    return runs


@contextmanager
def _angles(
    model: nn.Module,
    sites: Sequence[Site],
    runs: Mapping[str, Sequence[Sequence[int]]],
    batch: Batch,
    sums: Mapping[str, Tensor],
) -> Iterator[None]:
    """Add the angles of one forward pass to `sums`: of each run, and last the number of tokens."""
    decoder = decoder_modules(model)
    passed: dict[str, list[tuple[Tensor, Tensor]]] = {site.key: [] for site in sites}  # in and out, call by call
    in_decoder = {site.key: id(model.get_submodule(site.blocks[0])) in decoder for site in sites}
    with ExitStack() as hooks:
        for site in sites:
            for name in dict.fromkeys(site.blocks):
                block = model.get_submodule(name)

                def note(module: nn.Module, args: Any, kwargs: Any, output: Any, key: str = site.key) -> None:
                    passed[key].append((BlockCall.of(args, kwargs)[0], first_tensor(output)))

                hooks.callback(block.register_forward_hook(note, with_kwargs=True).remove)
        yield
    for site in sites:
        calls = passed[site.key]
        for start in range(0, len(calls), site.n_units):  # a model may run its stack more than once
            states = calls[start : start + site.n_units]
            for number, run in enumerate(runs[site.key]):
                ends = (states[run[0]][0], states[run[-1]][1])
                before, after = (batch.tokens(state, in_decoder[site.key]) for state in ends)
                sums[site.key][number] += _angle(before, after)
            sums[site.key][-1] += len(batch.tokens(states[0][0], in_decoder[site.key]))


def _angle(before: Tensor, after: Tensor) -> Tensor:
    """(n_tokens, d_model) twice -> the sum over tokens, float64 on the CPU; of float32 numbers, so that their order plays no
    part. By the tangent of the half angle: the arccosine of what is nearly 1 would be rounding alone."""
    u, v = (normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1) for x in (before, after))
    angles = 2 * torch.atan2((u - v).norm(dim=-1), (u + v).norm(dim=-1)) / math.pi
    return angles.float().cpu().sum(dtype=torch.float64)


def _require_finite(sums: Mapping[str, Tensor], batch: Batch) -> None:
    for key, total in sums.items():
        if not torch.isfinite(total).all():
            raise CalibrationError(
                f"the angles of {key} are not finite after calibration batch {batch.index}; expected numbers. Look for "
                "broken samples, or load the model in bfloat16 or float32."
            )
