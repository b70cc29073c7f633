"""Filling in a report from what a run did. Measured and estimated stay apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hf_prune.apply.present import dropped_modules, is_inside, present_entries, sparsity, units_there
from hf_prune.checkpoint.format import auto_class
from hf_prune.plan import KeepMasks
from hf_prune.recipe import Recipe
from hf_prune.report.report import PruningReport, hardware, versions
from hf_prune.structure import ModelStructure, Site, WeightSite
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
    try:
        macs = None if sample is None else count_macs(model, sample)
    except ValueError:  # PyTorch's norms over groups refuse a single sample of a single position
        macs = None
    return Totals(count_parameters(model), size, macs, sample)


def build_report(
    model: nn.Module,
    recipe: Recipe,
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
    n_near_ties: int = 0,
) -> PruningReport:
    """The report of one pruning.

    Args:
        model: as it is now.
        structure, masks: of the model before physical removal.
        shrunk: whether masked units were removed.
        dense, pruned: totals before and after.
        verification, verdict: what the checks said; None where they didn't run.
        notes, n_near_ties: of the plan.
        seconds: by stage.
    """
    config = getattr(model, "config", None)
    notes, dropped = list(notes), dropped_modules(structure, masks)
    if verification is None and shrunk and any(not keep.all() for keep in masks.units.values()):
        notes.append("not verified: the smaller model was not compared with the masked one")
    return PruningReport.from_dict(
        {
            "format": "hf_prune.report",
            "version": 1,
            "recipe": public_recipe(recipe),
            "seed": recipe.seed,
            "model": {
                "name_or_path": _public_name(getattr(config, "_name_or_path", "") or ""),
                "class": type(model).__name__,
                "model_type": structure.model_type,
            },
            "sites": [
                _site(site, units_there(structure, masks, site), dropped)
                for site in structure.sites
                if not site.branches or site.key in masks.units  # parts, where the recipe was about them
            ],
            "weights": [_weights(site, structure, masks) for site in structure.weights if site.name in masks.weights],
            "sparsity": sparsity(structure, masks),
            "totals": {"dense": dense.to_dict(), "pruned": pruned.to_dict(), "macs_of": dense.shapes()},
            "measured": {},
            "estimated": {},
            "verification": None if verification is None else asdict(verification),
            "checkpoint": {"loads_with": verdict.loads_with, "why": verdict.why, "class": auto_class(model)},
            "notes": notes,
            "n_near_ties": n_near_ties,
            "hardware": hardware(),
            "versions": versions(),
            "seconds": dict(seconds),
        }
    )


def _site(site: Site, there: Tensor, dropped: Sequence[str]) -> dict[str, Any]:
    if is_inside(site, dropped):
        removed = list(range(site.n_units))  # it left with its layer
    else:
        removed = [number for number, is_there in zip(site.numbers, there.tolist(), strict=True) if not is_there]
    return {
        "target": site.kind,
        "name": site.name,
        "n_units": site.n_units,
        "n_kept": site.n_units - len(removed),
        "removed": removed,
    }


def _weights(site: WeightSite, structure: ModelStructure, masks: KeepMasks) -> dict[str, Any]:
    present = present_entries(structure, masks, site)
    return {
        "name": site.name,
        "n_entries": int(present.sum()),
        "n_zero": int((present & ~masks.weights[site.name]).sum()),
    }


def public_recipe(recipe: Recipe) -> dict[str, Any]:
    """The recipe as it may be shared: of absolute paths `./` and the last part only. Tokens it never holds."""
    content = recipe.to_dict()
    for section, key in (("model", "name_or_path"), ("data", "name_or_path"), ("output", "dir")):
        value = (content.get(section) or {}).get(key)
        if value and Path(value).expanduser().is_absolute():
            content[section][key] = f"./{Path(value).name}"
    return content


def _public_name(name_or_path: str) -> str:
    """A Hub id as it is; of a local directory `./` and its last part, since reports are shared."""
    return f"./{Path(name_or_path).name}" if name_or_path and Path(name_or_path).exists() else name_or_path
