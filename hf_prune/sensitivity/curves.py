"""What a scan found: curves of loss against sparsity, as data, as a table, as a picture."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from hf_prune.allocation.sensitivity import FORMAT, VERSION
from hf_prune.errors import PruneError
from hf_prune.files import replace_file


@dataclass(frozen=True)
class Curve:
    """Of one site pruned alone: the loss at each sparsity.

    Attributes:
        key: of the site.
        target: what leaves.
        name: of the site.
        n_units: units; of a weight, its entries.
        sparsities: what really left, for each sparsity that was asked for.
        losses: mean loss by label.
    """

    key: str
    target: str
    name: str
    n_units: int
    sparsities: list[float]
    losses: list[float]


@dataclass(frozen=True)
class Sensitivity:
    """What a scan found.

    Attributes:
        model: class of the model.
        loss: of the model as it is.
        n_samples: on which losses were measured.
        criteria: by target, what chose the units.
        sparsities: that were asked for.
        sites: a curve for each.
        layers: the loss without each single layer: {"name": of the block, "loss": …}.
        notes: what the user should hear.
    """

    model: str
    loss: float
    n_samples: int
    criteria: dict[str, str]
    sparsities: list[float]
    sites: list[Curve]
    layers: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; what `allocation: {name: sensitivity, file: …}` reads."""
        return {"format": FORMAT, "version": VERSION, **asdict(self)}

    def to_json(self, path: str | Path | None = None) -> str:
        """As JSON; written to `path` if given, beside it first and then renamed."""
        text = json.dumps(self.to_dict(), indent=2) + "\n"
        if path is not None:
            path = Path(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, text)
        return text

    def tables(self) -> Iterator[Table]:
        """One for each target: the rise of the loss at each sparsity; then one of layers taken out one by one."""
        for target, criterion in self.criteria.items():
            table = Table(title=f"{target} by {criterion}: rise of the loss (it is {self.loss:.4g})")
            table.add_column("site", overflow="fold")
            for sparsity in self.sparsities:
                table.add_column(f"{sparsity:.0%}", justify="right")
            for curve in self.sites:
                if curve.target == target:
                    table.add_row(curve.name, *(f"{loss - self.loss:+.3g}" for loss in curve.losses))
            yield table
        if self.layers:
            table = Table(title="layers, one taken out at a time: rise of the loss")
            table.add_column("layer", overflow="fold")
            table.add_column("rise", justify="right")
            for layer in self.layers:
                table.add_row(layer["name"], f"{layer['loss'] - self.loss:+.3g}")
            yield table

    def draw(self, path: str | Path) -> None:
        """A panel a target, a line a site: dark ones lie near the input. The file's ending says its format.

        Raises:
            PruneError: Matplotlib isn't installed, or doesn't know the ending.
        """
        require_pictures()
        from matplotlib import colormaps
        from matplotlib.figure import Figure

        targets = list(self.criteria)
        figure = Figure(figsize=(5 * len(targets), 4), layout="constrained")
        for axes, target in zip(figure.subplots(1, len(targets), squeeze=False)[0], targets, strict=True):
            curves = [curve for curve in self.sites if curve.target == target]
            for number, curve in enumerate(curves):
                colour = colormaps["viridis"](number / max(1, len(curves) - 1))
                points = sorted({(0.0, self.loss), *zip(curve.sparsities, curve.losses, strict=True)})
                xs, ys = zip(*points, strict=True)
                label = curve.name if number in (0, len(curves) - 1) else None
                axes.plot(xs, [y - self.loss for y in ys], color=colour, marker=".", linewidth=1, label=label)
            axes.set_title(f"{target} by {self.criteria[target]}")
            axes.set_xlabel("sparsity of one site")
            axes.set_ylabel("rise of the loss")
            axes.set_yscale("symlog", linthresh=0.01)
            axes.grid(alpha=0.3)
            axes.legend(fontsize="x-small")
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            figure.savefig(path, dpi=150)
        except ValueError as error:
            raise PruneError(f"--picture {path}: {error}") from error


def require_pictures() -> None:
    """Refuse to draw without Matplotlib.

    Raises:
        PruneError: with the command that installs it.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise PruneError(
            "a picture needs Matplotlib, which isn't installed: `pip install 'hf_prune[plot]'`, or leave the picture out"
        ) from error
