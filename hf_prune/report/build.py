"""Filling in a report from what a run did. Measured and estimated stay apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.checkpoint.format import auto_class
from hf_prune.plan import KeepMasks
from hf_prune.report.report import PruningReport, hardware, versions
from hf_prune.structure import ModelStructure, Site
from hf_prune.structure.cost import count_macs, count_parameters


@dataclass(frozen=True)
class Totals:
    """Parameters (tied ones once), bytes of all tensors in memory, and MACs of one `sample` (None: no inputs)."""

    parameters: int
    bytes: int
    macs: int | None
    sample: Mapping[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        return {"parameters": self.parameters, "bytes": self.bytes, "macs": self.macs}

    def shapes(self) -> dict[str, list[int]]:
        """Of the sample, by input."""
        return {name: list(value.shape) for name, value in (self.sample or {}).items() if isinstance(value, Tensor)}


def measure_totals(model: nn.Module, sample: Mapping[str, Any] | None) -> Totals:
    """Count `model`; MACs are counted while it runs on `sample`: measure dense and pruned on the same."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    macs = None if sample is None else count_macs(model, sample)
    return Totals(count_parameters(model), size, macs, sample)


def first_sample(batches: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The first sample of the first batch, with a batch dimension of 1."""
    first = next(iter(batches), None)
    return None if first is None else {name: _first(value) for name, value in first.items()}


def _first(value: Any) -> Any:
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
                "name_or_path": _public_name(getattr(config, "_name_or_path", "") or ""),
                "class": type(model).__name__,
                "model_type": structure.model_type,
            },
            "sites": [_site(site, masks.units.get(site.key)) for site in structure.sites],
            "weights": [_weights(name, keep) for name, keep in masks.weights.items()],
            "sparsity": sparsity(structure, masks),
            "totals": {"dense": dense.to_dict(), "pruned": pruned.to_dict(), "macs_of": dense.shapes()},
            "measured": {},
            "estimated": {},
            "verification": None if verification is None else asdict(verification),
            "checkpoint": {"loads_with": verdict.loads_with, "why": verdict.why, "class": auto_class(model)},
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


def _public_name(name_or_path: str) -> str:
    """A Hub id as it is; of a local directory the last part, since reports are shared."""
    return Path(name_or_path).name if Path(name_or_path).exists() else name_or_path
