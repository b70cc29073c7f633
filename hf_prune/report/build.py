"""Filling in a report from what a run did. Measured and estimated stay apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.plan import KeepMasks
from hf_prune.report.report import PruningReport, hardware, versions
from hf_prune.structure import ModelStructure, Site
from hf_prune.structure.cost import count_macs, count_parameters


@dataclass(frozen=True)
class Totals:
    """Parameters (tied ones once), bytes of all tensors in memory, and MACs of one sample (None: no inputs)."""

    parameters: int
    bytes: int
    macs: int | None


def measure_totals(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> Totals:
    """Count `model`; MACs are counted while it runs on the first sample of the first batch."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    first = next(iter(batches), None)
    macs = None if first is None else count_macs(model, {k: _first_sample(v) for k, v in first.items()})
    return Totals(count_parameters(model), size, macs)


def _first_sample(value: Any) -> Any:
    return value[:1] if isinstance(value, Tensor) and value.dim() else value


def build_report(
    model: nn.Module,
    recipe: Any,
    *,
    structure: ModelStructure,
    masks: KeepMasks,
    shrunk: bool,
    dense: Totals,
    pruned: Totals,
    verification: Any,
    verdict: Any,
    notes: Sequence[str],
    seconds: Mapping[str, float],
) -> PruningReport:
    """The report of one pruning.

    Args:
        model: as it is now.
        structure, masks: of the model before physical removal.
        shrunk: whether masked units were removed.
        dense, pruned: totals before and after.
        verification, verdict: what the checks said; None where they didn't run.
    """
    config = getattr(model, "config", None)
    notes = list(notes)
    if verification is None and shrunk and any(not keep.all() for keep in masks.units.values()):
        notes.append("not verified: the smaller model was not compared with the masked one")
    return PruningReport.from_dict(
        {
            "format": "hf_prune.report",
            "version": 1,
            "recipe": recipe.to_dict(),
            "seed": recipe.seed,
            "model": {
                "name_or_path": getattr(config, "_name_or_path", "") or "",
                "class": type(model).__name__,
                "model_type": structure.model_type,
            },
            "sites": [_site(site, masks.units.get(site.key)) for site in structure.sites],
            "weights": [_weights(name, keep) for name, keep in masks.weights.items()],
            "sparsity": sparsity(structure, masks),
            "totals": {"dense": asdict(dense), "pruned": asdict(pruned)},
            "measured": {},
            "estimated": {},
            "verification": None if verification is None else asdict(verification),
            "checkpoint": {} if verdict is None else {"loads_with": verdict.loads_with, "why": verdict.why},
            "notes": notes,
            "hardware": hardware(),
            "versions": versions(),
            "seconds": dict(seconds),
        }
    )


def sparsity(structure: ModelStructure, masks: KeepMasks) -> dict[str, float]:
    """The fraction removed of all units of each target that has masks, and of all entries of the masked weights."""
    result = {}
    for target in ("layers", "attention_heads", "ffn_neurons"):
        keeps = [(site.n_units, masks.units.get(site.key)) for site in structure.of(target)]  # type: ignore[arg-type]
        if any(keep is not None for _, keep in keeps):
            removed = sum(int((~keep).sum()) for _, keep in keeps if keep is not None)
            result[target] = removed / sum(n_units for n_units, _ in keeps)
    if masks.weights:
        removed = sum(int((~keep).sum()) for keep in masks.weights.values())
        result["weights"] = removed / sum(keep.numel() for keep in masks.weights.values())
    return result


def _site(site: Site, keep: Tensor | None) -> dict[str, Any]:
    removed = [] if keep is None else torch.nonzero(~keep).reshape(-1).tolist()
    return {
        "target": site.target,
        "name": site.name,
        "n_units": site.n_units,
        "n_kept": site.n_units - len(removed),
        "removed": removed,
    }


def _weights(name: str, keep: Tensor) -> dict[str, Any]:
    return {"name": name, "n_entries": keep.numel(), "n_zero": int((~keep).sum())}
