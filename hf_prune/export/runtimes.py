"""Through Transformers' own exporters: ONNX, OpenVINO, ExecuTorch; compared with PyTorch, and timed beside dense."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_prune.errors import CheckpointError, PruneError, UnsupportedModelError, VerificationError
from hf_prune.report.report import hardware
from hf_prune.structure.inputs import example_inputs


if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = 1e-4  # of the largest output: float32 on both sides
REPEATS = 20
REPORT = "export_report.json"


@dataclass(frozen=True)
class Runtime:
    """What a format needs, and how Transformers calls it."""

    packages: tuple[str, ...]
    exporter: str
    config: str
    # of the runner; OpenVINO computes in bfloat16 where the processor can, unless told
    run: Mapping[str, Any] = field(default_factory=dict)
    takes: str = "seconds, of a large model minutes"


RUNTIMES = {
    "onnx": Runtime(("onnx", "onnxscript", "onnxruntime"), "OnnxExporter", "OnnxConfig"),
    "openvino": Runtime(
        ("openvino",), "OpenVINOExporter", "OpenVINOConfig", {"config": {"INFERENCE_PRECISION_HINT": "f32"}}
    ),
    "executorch": Runtime(
        ("executorch",), "ExecutorchExporter", "ExecutorchConfig", takes="minutes and gigabytes, of a small model too"
    ),
}


@dataclass(frozen=True)
class Exported:
    """What was written and measured. Latencies are medians in milliseconds, by model; dense may not be there."""

    format: str
    directory: str
    max_difference: float
    latency_ms: dict[str, float]
    inputs: dict[str, list[int]]
    hardware: dict[str, Any]


def require_runtime(name: str) -> Runtime:
    """The runtime of a format, once all that it needs is there.

    Raises:
        PruneError: the format is unknown, or packages are missing; with the command that installs them.
    """
    if name not in RUNTIMES:
        raise PruneError(f"--format {name}: expected one of {', '.join(RUNTIMES)}, gguf")
    runtime = RUNTIMES[name]
    missing = [package for package in runtime.packages if find_spec(package) is None]
    if find_spec("transformers.exporters") is None:
        missing.append("transformers>=5.23 (its exporters)")
    if missing:
        extra = "pip install executorch" if name == "executorch" else "pip install 'hf_prune[export]'"
        raise PruneError(f"--format {name} needs {', '.join(missing)}, which isn't installed: `{extra}`")
    return runtime


def require_empty(directory: str | Path) -> Path:
    """The absolute path of a directory that isn't there yet, or is empty.

    Raises:
        PruneError: it holds something.
    """
    directory = Path(directory).absolute()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise PruneError(f"{directory} is there and isn't empty; give another directory with --output")
    return directory


def export(
    model: PreTrainedModel,
    name: str,
    directory: str | Path,
    *,
    dense: PreTrainedModel | None = None,
    batch_size: int = 1,
    length: int = 128,
) -> Exported:
    """Export `model`, compare the file's outputs with the model's, time it beside `dense`, and write all of it or nothing.

    Args:
        model: in float32; in evaluation mode afterwards.
        name: a key of `RUNTIMES`.
        directory: where to; made if it isn't there, and refused if it holds something.
        dense: the model before pruning, timed in the same runtime by turns.
        batch_size, length: of the inputs that it is traced, compared and timed on. Sizes stay free where the exporter can
            keep them so.

    Raises:
        PruneError: a package is missing or the directory isn't empty; nothing was begun.
        UnsupportedModelError: the exporter can't take the model.
        VerificationError: the file computes something else; nothing was written.
    """
    runtime, directory = require_runtime(name), require_empty(directory)
    models = {"pruned": model, **({"dense": dense} if dense is not None else {})}
    for label, each in models.items():
        wrong = {str(p.dtype) for p in each.parameters() if p.is_floating_point()} - {"torch.float32"}
        if wrong:
            raise PruneError(f"the {label} model is in {wrong.pop()}; load it with dtype=torch.float32")
        each.eval()
    inputs = example_inputs(model, batch_size=batch_size, length=length)
    inputs = {key: value for key, value in inputs.items() if key != "labels" and isinstance(value, Tensor)}
    programs = {label: _traced(each, name, runtime, inputs) for label, each in models.items()}
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".hf_prune-", suffix=".partial", dir=directory.parent) as scratch:
        beside = Path(scratch) / "export"
        try:
            programs["pruned"].save_pretrained(beside)
            # what is compared is what was written
            programs["pruned"] = type(programs["pruned"]).from_pretrained(beside)
        except OSError as error:
            raise CheckpointError(
                f"writing to {directory} failed: {error}. Free some space, and export again"
            ) from error
        for program in programs.values():
            program.to(None, **runtime.run)
        found = Exported(
            name,
            str(directory),
            _difference(model, programs["pruned"], inputs),
            _latency_ms(programs, inputs),
            {key: list(value.shape) for key, value in inputs.items()},
            hardware(),
        )
        plain = {**asdict(found), "directory": directory.name}
        (beside / REPORT).write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
        if directory.exists():
            directory.rmdir()
        os.replace(beside, directory)
    return found


def _traced(model: PreTrainedModel, name: str, runtime: Runtime, inputs: Mapping[str, Tensor]) -> Any:
    exporters = import_module("transformers.exporters")
    exporter, config = getattr(exporters, runtime.exporter)(), getattr(exporters, runtime.config)
    use_cache = getattr(model.config, "use_cache", None)
    try:
        with _quiet():
            if use_cache:
                model.config.use_cache = False  # one pass, whose outputs can be compared
            return exporter.export(model, dict(inputs), config(dynamic=True))
    except Exception as error:  # of torch.export, of the runtime's converter: they share no class
        said = next(iter(str(error).strip().splitlines()), "")
        raise UnsupportedModelError(
            f"Transformers' exporter to {name} can't take {type(model).__name__}: {type(error).__name__}: {said}"
        ) from error
    finally:
        if use_cache:
            model.config.use_cache = use_cache


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the advice of exporters on versions, which is for developers of them."""
    loggers = [logging.getLogger(name) for name in ("transformers.exporters", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@torch.no_grad()
def _difference(model: nn.Module, program: Any, inputs: Mapping[str, Tensor]) -> float:
    """The largest, of the largest output; all outputs that both have and that are one tensor."""
    expected, found = model(**inputs), program(**inputs)
    names = [name for name in expected if isinstance(expected[name], Tensor) and isinstance(found.get(name), Tensor)]
    if not names:
        raise VerificationError(
            f"the exported {type(model).__name__} has no output that the model has; nothing was written"
        )
    ratios = []
    for name in names:
        scale = expected[name].abs().max().clamp_min(1e-12)
        ratios.append((expected[name] - found[name]).abs().max() / scale)
    worst = float(torch.stack(ratios).max())  # not a number, if one is
    if not worst <= TOLERANCE:
        raise VerificationError(
            f"the exported file differs from the model by {worst:.1e} of the largest output; expected at most {TOLERANCE:.0e}. "
            "Nothing was written"
        )
    return worst


def _latency_ms(programs: Mapping[str, Any], inputs: Mapping[str, Tensor]) -> dict[str, float]:
    """Medians; the models take turns, so that a slow moment meets both."""
    times: dict[str, list[float]] = {label: [] for label in programs}
    for turn in range(-3, REPEATS):
        for label, program in programs.items():
            started = time.perf_counter()
            program(**inputs)
            if turn >= 0:
                times[label].append(1e3 * (time.perf_counter() - started))
    return {label: median(values) for label, values in times.items()}
