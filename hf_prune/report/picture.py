"""A picture of what left: one heat map for each target, layers from top to bottom."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from hf_prune.errors import PruneError
from hf_prune.sensitivity.curves import require_pictures


if TYPE_CHECKING:
    from matplotlib.axes import Axes

FILE_NAME = "pruning.png"
_MANY = 64  # units of a row that are drawn one by one; of more the share that is kept in each of as many stretches
_TITLES = {"attention_heads": "attention heads", "ffn_neurons": "feed-forward neurons", "layers": "layers"}


def draw(content: Mapping[str, Any], file: str | Path | BinaryIO) -> None:
    """Draw what is kept, by target and layer, into a file (.png, .svg, .pdf; PNG where it has no name).

    Args:
        content: as `PruningReport.to_dict()`.
        file: a path, or what is open for writing.

    Raises:
        PruneError: nothing left, Matplotlib isn't there, or it doesn't know the kind of file.
    """
    grids = kept_grids(content)
    if not grids:
        raise PruneError("there is no picture to draw: the report says that nothing left")
    require_pictures()
    from matplotlib.figure import Figure

    height = max(2.5, 0.25 * max(len(rows) for rows in grids.values()) + 1.2)
    figure = Figure(figsize=(4.5 * len(grids), height), layout="constrained")
    for axes, (target, rows) in zip(figure.subplots(1, len(grids), squeeze=False)[0], grids.items(), strict=True):
        _draw_one(axes, target, rows)
    if isinstance(file, (str, Path)):
        file = Path(file)
        file.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(file, dpi=120, format=None if isinstance(file, Path) else "png")
    except ValueError as error:
        raise PruneError(f"--picture {file}: {error}") from error


def kept_grids(content: Mapping[str, Any]) -> dict[str, dict[str, list[float]]]:
    """By target, by site: the share kept (0 to 1) of each unit, or of each stretch of units; of targets that lost some."""
    found: dict[str, dict[str, list[float]]] = {}
    for site in content.get("sites") or ():
        kept = [1.0] * site["n_units"]
        for unit in site["removed"]:
            kept[unit] = 0.0
        found.setdefault(site["target"], {})[site["name"]] = _stretches(kept)
    grids = {target: rows for target, rows in found.items() if any(min(row) < 1 for row in rows.values())}
    weights = {
        weight["name"]: [1 - weight["n_zero"] / weight["n_entries"]]
        for weight in content.get("weights") or ()
        if weight["n_entries"]
    }
    return {**grids, "weights": weights} if any(row[0] < 1 for row in weights.values()) else grids


def _stretches(kept: Sequence[float]) -> list[float]:
    """At most `_MANY` numbers: means of stretches whose lengths differ by one at most."""
    if len(kept) <= _MANY:
        return list(kept)
    ends = [number * len(kept) // _MANY for number in range(_MANY + 1)]
    return [sum(kept[start:end]) / (end - start) for start, end in pairwise(ends)]


def _draw_one(axes: Axes, target: str, rows: Mapping[str, Sequence[float]]) -> None:
    width = max(map(len, rows.values()))
    nothing = float("nan")  # sites of fewer units leave the rest of their row empty
    grid = [[*row, *[nothing] * (width - len(row))] for row in rows.values()]
    axes.imshow(grid, cmap="viridis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    step = 1 + (len(rows) - 1) // 40
    labels = [f"{_number(name)} ({sum(row) / len(row):.0%})" for name, row in rows.items()]
    axes.set_yticks(range(0, len(rows), step), labels[::step], fontsize="xx-small")
    axes.set_xticks([])
    axes.set_title(f"{_TITLES.get(target, target)}: share kept", fontsize="small")


def _number(name: str) -> str:
    """`layer.3` of `bert.encoder.layer.3.attention.self`; the end of the name where it has no number."""
    found = re.findall(r"(\w+\.\d+)(?=\.|$)", name)
    return ".".join(found) if found else name.rpartition(".")[2]
