"""What the general rules of shrinking and of inputs get wrong, by model type: config fields, and arguments of `forward`."""

from __future__ import annotations

from typing import Any

from .inputs import Make


# model type -> fields of its config, nested as its sub-configs are
CONFIGS: dict[str, dict[str, Any]] = {}
# model type -> arguments of `forward`; None leaves one out
INPUTS: dict[str, dict[str, Make | None]] = {}
# model type -> fields without which the default config itself can't be made
FIRST: dict[str, dict[str, Any]] = {}
