"""The report of one pruning: what left, what was measured, on what."""

from __future__ import annotations

import io
import json
import os
import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from hf_prune.checkpoint.saving import ARTIFACTS
from hf_prune.errors import CheckpointError
from hf_prune.files import replace_file
from hf_prune.report.table import lines, site_table, totals_table
from hf_prune.report.verdict import verdict


FORMAT, VERSION = "hf_prune.report", 1
_PARTS = {"recipe", "seed", "model", "sites", "weights", "sparsity", "totals", "measured", "estimated", "verification"}
_PARTS |= {"checkpoint", "notes", "hardware", "versions", "seconds"}
PLAIN_WIDTH = 400  # columns where there is no terminal: more than tables need, so that no name is broken


@dataclass
class PruningReport:
    """What a pruning did; `str()` is a table.

    Args:
        content: plain data, as `pruning_report.json` holds it.
    """

    content: dict[str, Any]

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> PruningReport:
        """A report with a copy of `content`.

        Args:
            content: from `to_dict`.
        """
        return cls(dict(content))

    def to_dict(self) -> dict[str, Any]:
        """The content, and what it amounts to (`verdict`)."""
        return {**self.content, "verdict": verdict(self.content)}

    def to_json(self, path: str | Path | None = None) -> str:
        """As JSON.

        Args:
            path: written to if given, beside it first and then renamed.

        Raises:
            OSError: it can't be written.
        """
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"
        if path is not None:
            replace_file(Path(path), text)
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

        Args:
            path: of the file.

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
        if missing := sorted(_PARTS - content.keys()):
            raise CheckpointError(f"{path} is damaged: it lacks {missing[0]!r}")
        return cls(content)

    def __str__(self) -> str:
        buffer = io.StringIO()
        self.print_to(Console(file=buffer, width=PLAIN_WIDTH))
        return "\n".join(line.rstrip() for line in buffer.getvalue().rstrip().splitlines())

    def print_to(self, console: Console) -> None:
        """Site by site, then dense beside pruned, then what tables don't say.

        Args:
            console: of Rich, which knows how wide it is.
        """

        def say(line: str) -> None:
            console.print(line, markup=False, highlight=False, soft_wrap=True)

        # not as the tables' titles, which are broken where a table is narrow
        say("what left (sites that are alike share a row; numbers are of each)")
        console.print(site_table(self.content))
        say(f"{self.content['model']['class']}, dense and pruned")
        console.print(totals_table(self.content))
        for line in lines(self.content):
            say(line)


def plain_console(quiet: bool = False) -> Console:
    """Standard output: as wide as the terminal, or as wide as tables need where there is none."""
    return Console(quiet=quiet, width=None if sys.stdout.isatty() else PLAIN_WIDTH)


def hardware() -> dict[str, Any]:
    """What the figures were measured on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    counts = {"cores": os.cpu_count(), "threads": torch.get_num_threads()}
    return {"machine": platform.machine(), "cpu": _cpu_name(), **counts, "gpu": gpu}


def _cpu_name() -> str | None:
    """As the kernel names it; Python itself knows the name on some systems only."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or None
    found = re.search(r"^model name\s*:\s*(.+)$", text, flags=re.MULTILINE)
    return found[1].strip() if found else None


def versions() -> dict[str, str]:
    """Of what took part."""
    found = {"python": platform.python_version()}
    for package in ("hf_prune", "transformers", "torch", "accelerate", "huggingface_hub"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
