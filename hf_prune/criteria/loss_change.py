"""Loss change: take a unit out, and see what the loss becomes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_prune.calibration.batches import Batch, at_most, dealt
from hf_prune.calibration.behind import loss_behind, loss_of, mean_losses, through
from hf_prune.calibration.blocks import Chain, record_chain
from hf_prune.calibration.collect import evaluation
from hf_prune.calibration.loss import with_labels
from hf_prune.calibration.statistics import Statistics
from hf_prune.criteria.base import no_weights
from hf_prune.errors import RecipeError, UnsupportedModelError
from hf_prune.structure import stacks_of
from hf_prune.structure.naming import is_within
from hf_prune.structure.routing import KeptExperts
from hf_prune.structure.sites import Site, Target, WeightSite


# (number of a batch, units out already, units to try) -> the summed loss without those out and one that is tried, each
Measure = Callable[[int, Sequence[int], Sequence[int]], Iterable[Tensor]]

AT_ONCE = 4  # units measured together: what lies before them is run once


@dataclass(frozen=True)
class LossChange:
    """L(without the unit) - L, measured; greedy: once a unit is chosen to leave, the others of its site are measured without
    it. Not all of them: the cheapest by their last figures, until one that has just been measured is cheaper than all
    those figures (lazy greedy, Minoux 1978). That is the full search wherever a unit only gets dearer as others leave.

    Layers against the whole model: the perplexity criterion of Kim et al. 2024 (Shortened LLaMA), who remove all in one
    shot; greedy, the iterated check of SLEB (Song et al. 2024). Perplexity is the exponential of the loss, and ranks alike.
    Heads and neurons: the ablation of Michel et al. 2019 (section 3.2), on the loss; what the output projection reads of
    the unit is zero. (Where a norm runs over all heads, the others aren't rescaled.)

    Args:
        greedy: measure anew after each removal; else all against the whole model. If None: for layers.
        samples: how many calibration samples to measure on; each costs about half a forward pass for each unit tried.
    """

    greedy: bool | None = None
    samples: int = 8
    loss_units: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise RecipeError(f"samples of criterion loss_change is {self.samples}; expected at least 1")

    def needs(self, target: Target) -> frozenset[str]:
        return frozenset()

    def score_units(self, model: nn.Module, site: Site, statistics: Statistics | None) -> Tensor:
        raise AssertionError("loss_change measures by itself; see `rank_units`")

    def score_weights(self, model: nn.Module, site: WeightSite, statistics: Statistics | None) -> Tensor:
        raise no_weights("loss_change")

    def rank_units(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        batches: Sequence[Mapping[str, Any]],
        n_removed: Mapping[str, int],
        there: Mapping[str, Tensor],
        seed: int,
    ) -> dict[str, Tensor]:
        """Scores by site key, float32 (n_units,): the loss change; greedy: those that leave first score lowest. 0 of what is gone.

        Raises:
            CalibrationError: there is no loss, or it is not finite.
            RecipeError: a layer is called several times.
        """
        chosen = at_most(batches, self.samples)
        scores = {}
        with evaluation(model, seed), torch.no_grad():
            mine = [with_labels(model, batch) for batch in dealt(chosen, next(model.parameters()).device)]
            whole = mean_losses(model, mine, lambda number: [loss_of(model, mine[number])], 1)
            for site, measure in _measures(model, sites, mine):
                units = torch.nonzero(there[site.key]).reshape(-1).tolist()
                n_leaving = n_removed[site.key] if self._is_greedy(site) else 0
                change = _rank(model, mine, measure, units, n_leaving, whole)
                scores[site.key] = torch.zeros(site.n_units).index_put_((torch.tensor(units),), change.float())
        return scores

    def _is_greedy(self, site: Site) -> bool:
        return site.target == "layers" if self.greedy is None else self.greedy


def _rank(
    model: nn.Module, batches: Sequence[Batch], measure: Measure, units: Sequence[int], n_leaving: int, whole: Tensor
) -> Tensor:
    """The loss change without each of `units`; the first `n_leaving` to leave below all others, in their order: float64."""

    def losses(tried: Sequence[int], out: Sequence[int]) -> dict[int, float]:
        found = mean_losses(model, batches, lambda number: measure(number, out, tried), len(tried))
        return dict(zip(tried, found.tolist(), strict=True))

    loss = float(whole)
    change = {unit: found - loss for unit, found in losses(units, []).items()}
    out: list[int] = []
    fresh = set(units)  # measured without all that are out
    while len(out) < n_leaving:
        left = sorted((unit for unit in units if unit not in out), key=lambda unit: change[unit])
        if left[0] in fresh:
            loss += change[left[0]]
            out.append(left[0])
            fresh = set()
        else:
            stale = sorted([unit for unit in left if unit not in fresh][:AT_ONCE])
            change |= {unit: found - loss for unit, found in losses(stale, out).items()}
            fresh.update(stale)
    least = min(change.values())
    change |= {unit: least - 1 - number for number, unit in enumerate(reversed(out))}
    return torch.tensor([change[unit] for unit in units], dtype=torch.float64)


def _measures(model: nn.Module, sites: Sequence[Site], batches: Sequence[Batch]) -> Iterator[tuple[Site, Measure]]:
    """Each site with how it is measured. What is measured has to be before the next one comes: hidden states move on."""
    left = {site.key: site for site in sites}
    for site in sites:
        if site.target == "layers":
            if site.is_shared:
                raise RecipeError(
                    f"criterion loss_change: {site.name} is one block called {site.n_units} times; use another"
                )
            chain = record_chain(model, site.name, site.blocks, batches, {})
            yield left.pop(site.key), _of_parts(model, site, chain) if site.branches else _of_layers(model, chain)
    for name, blocks in stacks_of(model).items():
        inside = [site for site in left.values() if _block_of(site, blocks) is not None]
        if not inside or len(set(blocks)) < len(blocks):
            continue
        try:
            chain = record_chain(model, name, blocks, batches, {})
        except UnsupportedModelError:
            continue  # no chain: as what is in no stack
        for position, block in enumerate(blocks):
            for site in inside:
                if _block_of(site, blocks) == block:
                    yield left.pop(site.key), _of_units(model, site, batches, chain, position)
            chain.run_(position, model.get_submodule(block))
    for site in left.values():
        yield site, _of_units(model, site, batches, None, 0)


def _of_layers(model: nn.Module, chain: Chain) -> Measure:
    def measure(number: int, out: Sequence[int], tried: Sequence[int]) -> Iterator[Tensor]:
        hidden = chain.hidden[number]
        for position in range(len(chain.blocks)):
            if position not in out:
                if position in tried:
                    later = [other for other in range(position + 1, len(chain.blocks)) if other not in out]
                    yield loss_behind(model, chain, number, through(model, chain, number, hidden, later))
                hidden = through(model, chain, number, hidden, [position])

    return measure


def _of_parts(model: nn.Module, site: Site, chain: Chain) -> Measure:
    def measure(number: int, out: Sequence[int], tried: Sequence[int]) -> Iterator[Tensor]:
        hidden, reached = chain.hidden[number], 0
        for unit in tried:  # ascending
            position = site.numbers[unit]
            with _without(model, site, out):
                hidden, reached = through(model, chain, number, hidden, range(reached, position)), position
            with _without(model, site, [*out, unit]):
                behind = through(model, chain, number, hidden, range(position, len(chain.blocks)))
            yield loss_behind(model, chain, number, behind)

    return measure


def _of_units(model: nn.Module, site: Site, batches: Sequence[Batch], chain: Chain | None, position: int) -> Measure:
    """By way of the blocks from `position` on, whose inputs the chain holds; of the whole model without a chain."""

    def measure(number: int, out: Sequence[int], tried: Sequence[int]) -> Iterator[Tensor]:
        for unit in tried:
            with _without(model, site, [*out, unit]):
                if chain is None:
                    yield loss_of(model, batches[number])
                else:
                    behind = range(position, len(chain.blocks))
                    hidden = through(model, chain, number, chain.hidden[number], behind)
                    yield loss_behind(model, chain, number, hidden)

    return measure


@contextmanager
def _without(model: nn.Module, site: Site, units: Sequence[int]) -> Iterator[None]:
    """Inside, what the output projections read of `units` is zero; of parts, what they write; of experts, none is chosen."""
    with ExitStack() as hooks:
        if site.target == "experts":
            keep = torch.ones(site.n_units, dtype=torch.bool).index_fill_(
                0, torch.tensor(list(units), dtype=torch.long), False
            )
            router = model.get_submodule(site.router)
            hooks.callback(router.register_forward_hook(KeptExperts(site, keep), with_kwargs=True).remove)
        elif site.holder:
            hooks.enter_context(_zeroed(model, site, units))
        for last in (last for unit in units if site.branches for last in site.branches[unit].outputs):
            silence = model.get_submodule(last).register_forward_hook(
                lambda m, a, output: (
                    torch.zeros_like(output)
                    if isinstance(output, Tensor)
                    else type(output)((torch.zeros_like(output[0]), *output[1:]))
                )
            )
            hooks.callback(silence.remove)
        for read in site.reads:
            start, width = read.span.start, read.span.width

            def zero(module: nn.Module, args: Any, start: int = start, width: int = width) -> Any:
                x = args[0].clone()
                for unit in units:
                    x.narrow(-1, start + unit * width, width).zero_()
                return (x, *args[1:])

            hooks.callback(model.get_submodule(read.module).register_forward_pre_hook(zero).remove)
        yield


@contextmanager
def _zeroed(model: nn.Module, site: Site, units: Sequence[int]) -> Iterator[None]:
    """Inside, the entries that read `units` are zeros: where they are read no hook reaches."""
    reading = [piece for piece in site.slices if not piece.writes]
    index = [piece.index(torch.tensor(list(units), dtype=torch.long)) for piece in reading]
    tensors = [model.get_parameter(piece.name).data for piece in reading]
    before = [
        tensor.index_select(p.dim, i.to(tensor.device)) for tensor, p, i in zip(tensors, reading, index, strict=True)
    ]
    try:
        for tensor, piece, entries in zip(tensors, reading, index, strict=True):
            tensor.index_fill_(piece.dim, entries.to(tensor.device), 0)
        yield
    finally:
        for tensor, piece, entries, values in zip(tensors, reading, index, before, strict=True):
            tensor.index_copy_(piece.dim, entries.to(tensor.device), values)


def _block_of(site: Site, blocks: Sequence[str]) -> str | None:
    """The block that holds a site, if any of `blocks` does."""
    return next((block for block in blocks if all(is_within(place, block) for place in site.places)), None)
