"""One pass over the calibration data collects every statistic that is asked for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from hf_prune.calibration import statistics as names
from hf_prune.calibration.batches import Batch, dealt, take, without_logits
from hf_prune.calibration.branches import Join, PartGates, PartSums, find_joins
from hf_prune.calibration.loss import drawn_loss_sum, loss_sum, n_labels, require_labels, with_labels
from hf_prune.calibration.recorders import (
    GateSums,
    InputSums,
    LayerGates,
    LayerSums,
    Recorder,
    UnitGates,
    WeightGradients,
)
from hf_prune.calibration.reduction import raise_together, sum_over_processes
from hf_prune.calibration.routing import RoutedNorms, RoutedShares
from hf_prune.calibration.statistics import NEEDS_OF_GRADIENTS, NEEDS_OF_LAYERS, NEEDS_OF_READS, Statistics
from hf_prune.errors import CalibrationError, UnsupportedModelError
from hf_prune.structure.cost import evaluating
from hf_prune.structure.sites import Site, WeightSite


def collect(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    needs: frozenset[str],
    sites: Sequence[Site | WeightSite],
    *,
    labels: str = "given",
    seed: int = 0,
) -> Statistics:
    """Run `model` over `batches` and collect `needs` of `sites`.

    In evaluation mode and with a random state of its own; training flags, `requires_grad`, `.grad` and the random
    state are afterwards as before. On several processes each runs every world-th batch, and all get the sums.

    Args:
        model: on the device where it runs.
        batches: keyword inputs, batch first; every process passes the same.
        needs: fields of `Statistics`.
        sites: what will be scored.
        labels: of the loss whose gradients are collected: "given", "drawn" from the model's own distribution, or "both", as
            two losses of the same batch.
        seed: of the private random state.

    Raises:
        CalibrationError: no data, no labels where a loss is needed, or numbers that are not finite.
        UnsupportedModelError: a need looks where no hook reaches, inside stacked experts.
    """
    _require_reads(needs, sites)
    inputs = take(batches)
    parts = [site for site in sites if isinstance(site, Site) and site.branches]
    joins: list[Join] = []
    if parts and needs & NEEDS_OF_LAYERS:
        with evaluation(model, seed):
            joins = find_joins(model, parts, inputs)
    recorders = _recorders(model, needs, sites, joins)
    with_gradients = bool(needs & NEEDS_OF_GRADIENTS)
    device = next(model.parameters()).device
    n_seen = torch.zeros(2, dtype=torch.float64)  # samples, labels
    error: CalibrationError | None = None
    scored = {
        parameter
        for _, recorder in recorders
        if isinstance(recorder, WeightGradients)
        for parameter in recorder.parameters.values()
    }
    with evaluation(model, seed, scored, with_gradients), ExitStack() as hooks:
        for _, recorder in recorders:
            for handle in recorder.attach():
                hooks.callback(handle.remove)
        try:
            for batch in dealt(inputs, device):
                n_seen += torch.tensor([batch.n_samples, _run(model, batch, recorders, with_gradients, labels, seed)])
        except CalibrationError as caught:
            error = caught
    raise_together(error)
    sums = [total for _, recorder in recorders for total in (*recorder.sums.values(), *recorder.counts.values())]
    sum_over_processes([*sums, n_seen])
    if with_gradients:
        require_labels(int(n_seen[1]))
    return _statistics(recorders, int(n_seen[0]), int(n_seen[1]))


def _require_reads(needs: frozenset[str], sites: Sequence[Site | WeightSite]) -> None:
    for site in sites:
        if needs & NEEDS_OF_READS and isinstance(site, Site) and is_stacked(site):
            raise UnsupportedModelError(
                f"{site.name} holds its neurons in stacked weights of experts or in convolutions, so that what is read of each "
                "can't be looked at; take l1, l2, gradient, loss_change or random, or leave it out with `exclude`"
            )


def is_stacked(site: Site | WeightSite) -> bool:
    """Whether no hook sees where the units are read: neurons of experts in 3-D weights, or between convolutions."""
    return isinstance(site, Site) and site.target == "ffn_neurons" and not site.reads


def _recorders(
    model: nn.Module, needs: frozenset[str], sites: Sequence[Site | WeightSite], joins: Sequence[Join]
) -> list[tuple[str, Recorder]]:
    """For each need, in a fixed order, what records it; heads and neurons by one recorder, layers and parts by others."""
    parts = [site for site in sites if isinstance(site, Site) and site.branches]
    layers = [site for site in sites if isinstance(site, Site) and site.target == "layers" and not site.branches]
    units = [site for site in sites if isinstance(site, Site) and site.reads]
    experts = [site for site in sites if isinstance(site, Site) and site.target == "experts"]
    others = [site for site in sites if not isinstance(site, Site) or site.target != "layers"]

    def of_layers(of: Callable[[Tensor, Tensor], Tensor]) -> list[Recorder]:
        return [LayerSums(model, layers, of), PartSums(model, parts, joins, of)]

    def gates(of: Callable[[Tensor], Tensor], per_token: bool = False) -> list[Recorder]:
        sums = partial(GateSums, of, per_token)
        return [UnitGates(model, units, sums), LayerGates(model, layers, sums), PartGates(model, parts, joins, sums)]

    makers: dict[str, Callable[[], list[Recorder]]] = {
        names.SQUARED_INPUTS: lambda: [InputSums(model, others)],
        names.MEAN_INPUTS: lambda: [InputSums(model, others, lambda x: x)],
        names.FIRING: lambda: [InputSums(model, others, _fires)],
        names.SQUARED_UPDATES: lambda: of_layers(lambda x, y: (y - x).square().mean(-1)),
        names.TURNS: lambda: of_layers(lambda x, y: 1 - cosine_similarity(x, y, dim=-1)),
        names.GATE_GRADIENTS: lambda: gates(torch.abs),
        names.SQUARED_GATE_GRADIENTS: lambda: gates(torch.square),
        names.ROUTED_SHARES: lambda: [RoutedShares(model, experts)],
        names.ROUTED_NORMS: lambda: [RoutedNorms(model, experts)],
        names.SQUARED_TOKEN_GATES: lambda: gates(torch.square, per_token=True),
        names.WEIGHT_GRADIENTS: lambda: [WeightGradients(model, sites)],
    }
    return [(need, recorder) for need in sorted(needs) for recorder in makers[need]()]


def _fires(x: Tensor) -> Tensor:
    """(n_tokens, d) -> 1 where |x| is above a tenth of the token's root mean square: 0 is below, whatever the rest; nan
    where that is not finite."""
    size = x.square().mean(-1, keepdim=True).sqrt()
    return torch.where(torch.isfinite(size), (x.abs() > 0.1 * size).to(x.dtype), torch.nan)


def _run(
    model: nn.Module,
    batch: Batch,
    recorders: Sequence[tuple[str, Recorder]],
    with_gradients: bool,
    labels: str,
    seed: int,
) -> int:
    """One forward pass, and backward passes of the summed losses. Returns how many labels they ran over."""
    count = 0
    if with_gradients:
        batch = with_labels(model, batch)
        count = n_labels(model, batch)
    for _, recorder in recorders:
        recorder.begin(batch)
    with torch.set_grad_enabled(with_gradients):
        outputs = model(**(batch.inputs if with_gradients else without_logits(model, batch.inputs)))
        losses = []
        if count and labels in ("given", "both"):  # a piece of a batch may hold no label
            losses.append(loss_sum(outputs, batch, count))
        if count and labels in ("drawn", "both"):
            losses.append(drawn_loss_sum(model, outputs, batch, seed))
        for left, loss in zip(reversed(range(len(losses))), losses, strict=True):
            if not loss.requires_grad:
                raise CalibrationError(
                    f"the loss of calibration batch {batch.index} depends on nothing that is to be scored. "
                    "Add calibration data that reaches those modules, or leave them out with `exclude`."
                )
            loss.backward(retain_graph=left > 0)
            for _, recorder in recorders if left else ():  # the next loss is one more batch
                recorder.end()
                recorder.begin(batch)
    for _, recorder in recorders:
        recorder.end()
    return count * len(losses)


@contextmanager
def evaluation(
    model: nn.Module, seed: int, scored: Collection[Tensor] = (), with_gradients: bool = False
) -> Iterator[None]:
    """The model as scoring needs it, with gradients of the `scored` parameters if any; all is put back."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    config = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    devices = sorted({p.device.index for p in flags if p.device.type == "cuda"})
    with evaluating(model), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        try:
            if config is not None and use_cache:
                config.use_cache = False  # a cache of keys would only take memory
            for parameter in flags:
                parameter.grad = None
                parameter.requires_grad_(with_gradients and parameter in scored)
            yield
        finally:
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)
                parameter.grad = gradients[parameter]
            if config is not None and use_cache:
                config.use_cache = use_cache


def _statistics(recorders: Sequence[tuple[str, Recorder]], n_samples: int, n_labels: int) -> Statistics:
    statistics = Statistics(n_samples=n_samples, n_labels=n_labels)
    for need, recorder in recorders:
        for key, total in recorder.sums.items():
            over = max(1, n_labels) if need in NEEDS_OF_GRADIENTS else recorder.counts[key].clamp(min=1)
            getattr(statistics, need)[key] = total / over
    return statistics
