"""The report of one pruning: what left, what was measured, on what."""

from __future__ import annotations

import io
import json
import os
import platform
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from hf_prune.checkpoint.saving import ARTIFACTS
from hf_prune.errors import CheckpointError


FORMAT, VERSION = "hf_prune.report", 1
PLAIN_WIDTH = 110  # columns where there is no terminal
_FEW = 8  # units that are named one by one in the table


@dataclass
class PruningReport:
    """Plain data under `content`, as `pruning_report.json` holds it; `str()` is a table."""

    content: dict[str, Any]

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> PruningReport:
        return cls(dict(content))

    def to_dict(self) -> dict[str, Any]:
        return self.content

    def to_json(self, path: str | Path | None = None) -> str:
        """As JSON; written to `path` if given, beside it first and then renamed."""
        text = json.dumps(self.content, indent=2, ensure_ascii=False) + "\n"
        if path is not None:
            path = Path(path)
            handle, beside = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(beside, path)
        return text

    def attach_(self, model: nn.Module, metadata: Mapping[str, Any] | None = None) -> None:
        """Put recipe, report and card on `model`, for `save_pretrained` and `push_to_hub` to write beside the weights.

        Args:
            model: the pruned model.
            metadata: header fields of the card, as `render_card` takes them.
        """
        from hf_prune.recipe import Recipe
        from hf_prune.report.card import render_card

        recipe = Recipe.from_dict(self.content["recipe"]).to_yaml()
        base_model = self.content["model"]["name_or_path"] or None
        model.__dict__[ARTIFACTS] = {
            "recipe.yaml": recipe,
            "pruning_report.json": self.to_json(),
            "README.md": render_card(self.content, recipe, base_model=base_model, metadata=dict(metadata or {})),
        }

    @classmethod
    def from_json(cls, path: str | Path) -> PruningReport:
        """Read what `to_json` wrote.

        Raises:
            CheckpointError: there is no such file, or it holds something else or something newer.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise CheckpointError(
                f"there is no {path}; expected the directory of a model pruned by hf_prune"
            ) from error
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} can't be read: {error}") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise CheckpointError(f"{path} is no report of hf_prune")
        if content.get("version") != VERSION:
            raise CheckpointError(
                f"{path} has version {content.get('version')!r}; this reads {VERSION}. Upgrade hf_prune."
            )
        return cls(content)

    def __str__(self) -> str:
        buffer = io.StringIO()
        self.print_to(Console(file=buffer, width=PLAIN_WIDTH))
        return buffer.getvalue().rstrip()

    def print_to(self, console: Console) -> None:
        """Site by site, then dense beside pruned, then what tables don't say."""
        console.print(self.site_table())
        console.print(self.table())
        for line in self.lines():
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    def site_table(self) -> Table:
        """What left of each site, and what is kept."""
        table = Table(title="what left", title_justify="left")
        for column in ("target", "site", "of", "kept", "left"):
            table.add_column(column, justify="right" if column in ("of", "kept") else "left", overflow="fold")
        for site in self.content["sites"]:
            if site["removed"]:
                table.add_row(site["target"], site["name"], f"{site['n_units']:,}", f"{site['n_kept']:,}", _left(site))
        for weight in self.content["weights"]:
            n_entries, n_zero = weight["n_entries"], weight["n_zero"]
            if n_zero:
                kept = f"{n_entries - n_zero:,}"
                table.add_row("weights", weight["name"], f"{n_entries:,}", kept, f"{n_zero / n_entries:.1%}")
        return table

    def table(self) -> Table:
        """Dense beside pruned."""
        content = self.content
        table = Table(title=f"{content['model']['class']} pruned", title_justify="left")
        table.add_column("")
        for column in ("dense", "pruned", "change"):
            table.add_column(column, justify="right")
        dense, pruned = content["totals"]["dense"], content["totals"]["pruned"]
        measured = content["measured"]
        counted = ("parameters", "macs") if measured.get("bytes_on_disk") else ("parameters", "macs", "bytes")
        rows = [(name, dense.get(name), pruned.get(name)) for name in counted]
        for kind, unit in (("metrics", "{}"), ("bytes_on_disk", ""), ("latency_ms", "latency, batch of {} (ms)")):
            values = measured.get(kind, {})
            if kind == "bytes_on_disk" and values:
                rows.append(("bytes on disk", values.get("dense"), values["pruned"]))
            elif values:
                dense_values = values.get("dense", {})  # not every run evaluates the dense model
                rows += [(unit.format(name), dense_values.get(name), new) for name, new in values["pruned"].items()]
        titles = {"macs": f"MACs, {_sample(content['totals'])}", "bytes": "bytes in memory"}
        for name, old, new in rows:
            table.add_row(titles.get(name, name), _shown(old), _shown(new), _change(old, new))
        return table

    def lines(self) -> list[str]:
        """What the table does not say."""
        content, lines = self.content, []
        removed = {target: share for target, share in content["sparsity"].items() if target != "weights"}
        if removed:
            shares = ", ".join(f"{share:.1%} of {target}" for target, share in removed.items())
            lines.append(f"left: {shares} (heads and neurons: of those in kept layers)")
        if "weights" in content["sparsity"]:
            zeros = content["sparsity"]["weights"]
            lines.append(f"zero: {zeros:.1%} of the entries of pruned weights; zeros make no dense kernel faster")
        check = content["verification"]
        if check:
            lines.append(
                f"verified on {check['inputs']} inputs: the smaller model differs from the masked one by at most "
                f"{check['max_difference']:.1e} of the largest output ({check['dtype']}, tolerance {check['tolerance']:.0e})"
            )
        if content["checkpoint"]:
            lines.append(f"loads with {content['checkpoint']['loads_with']}: {content['checkpoint']['why']}")
        return lines + [f"note: {note}" for note in content["notes"]]


def plain_console(quiet: bool = False) -> Console:
    """Standard output: as wide as the terminal, or as wide as tables need where there is none."""
    return Console(quiet=quiet, width=None if sys.stdout.isatty() else PLAIN_WIDTH)


def hardware() -> dict[str, Any]:
    """What the figures were measured on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"machine": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu}


def versions() -> dict[str, str]:
    """Of what took part."""
    found = {"python": platform.python_version()}
    for package in ("hf_prune", "transformers", "torch", "accelerate", "huggingface_hub"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _left(site: Mapping[str, Any]) -> str:
    removed = site["removed"]
    if not site["n_kept"]:
        return "all, with its layer"
    share = f"{len(removed) / site['n_units']:.1%}"
    return f"{share}: {', '.join(map(str, removed))}" if len(removed) <= _FEW else share


def _sample(totals: Mapping[str, Any]) -> str:
    shapes = totals.get("macs_of") or {}
    shape = shapes.get("input_ids") or next(iter(shapes.values()), None)
    return f"input {' × '.join(map(str, shape))}" if shape else "not counted"


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _change(old: Any, new: Any) -> str:
    return f"{new / old - 1:+.1%}" if old and new is not None else ""
