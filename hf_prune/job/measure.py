"""Measurements of two models side by side, in one run: latency, bytes on disk."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from hf_prune.calibration.batches import to_device


@torch.no_grad()
def latency_ms(models: Mapping[str, nn.Module], inputs: Mapping[str, Any], repeats: int = 30) -> dict[str, float]:
    """Median milliseconds of one forward pass. The models take turns, so that a slow moment meets both.

    Args:
        models: by name; in evaluation mode afterwards.
        inputs: keyword inputs of all of them; labels are left out.
        repeats: timed passes of each, after three that are not timed.
    """
    times: dict[str, list[float]] = {name: [] for name in models}
    placed = {name: _placed(inputs, model.eval()) for name, model in models.items()}
    for turn in range(-3, repeats):
        for name, model in models.items():
            _wait()
            started = time.perf_counter()
            model(**placed[name])
            _wait()
            if turn >= 0:
                times[name].append(1e3 * (time.perf_counter() - started))
    return {name: median(values) for name, values in times.items()}


def _placed(inputs: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    without_labels = {name: value for name, value in inputs.items() if name != "labels"}
    return to_device(without_labels, next(model.parameters()).device)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def weight_bytes(directory: str | Path) -> int:
    """Bytes of a checkpoint's weight files."""
    return sum(path.stat().st_size for path in Path(directory).glob("*.safetensors"))
