"""The protocol: one model, the same token windows, each method in a process of its own, the same figures of each.

`quality.py` measures hf_prune and writes the inputs; `rivals.py` measures other tools on them, in an environment of its own.
So this file imports neither.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import resource
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel


LENGTH, BATCH_SIZE = 512, 8
WINDOWS, EVALUATION = "windows.safetensors", "evaluation/"
# what a method is asked for -> the page's heading; the rows below one heading compare
WEIGHTS, N_OF_M, STRUCTURED = "50 % of the weights", "2:4", "20 % of the parameters, structured"
TENTH_OF_LAYERS, FIFTH_OF_LAYERS = "10 % of the layers", "20 % of the layers"
TRIED = "20 % of the parameters, what else was tried"
Batches = list[dict[str, torch.Tensor]]
# prune(method, model, calibration) -> the pruned model
Prune = Callable[[str, PreTrainedModel, Batches], torch.nn.Module]


def save_windows(
    inputs: Path, calibration: torch.Tensor, evaluation: Mapping[str, torch.Tensor], origin: Mapping[str, str]
) -> None:
    """Token ids (n_windows, LENGTH) beside the model in `inputs`, and where the texts come from."""
    texts = {EVALUATION + name: ids for name, ids in evaluation.items()}
    beside = inputs / f".{WINDOWS}.partial"
    save_file({"calibration": calibration, **texts}, beside, metadata=dict(origin))
    os.replace(beside, inputs / WINDOWS)  # tensors may be mapped from the file that was there


def calibration_windows(inputs: Path) -> torch.Tensor:
    return load_file(inputs / WINDOWS)["calibration"]


def evaluation_windows(inputs: Path) -> dict[str, torch.Tensor]:
    windows = load_file(inputs / WINDOWS)
    return {name.removeprefix(EVALUATION): ids for name, ids in windows.items() if name != "calibration"}


def measure_all(
    methods: Mapping[str, Mapping], prune: Prune, inputs: Path, packages: Iterable[str], file: Path | None
) -> None:
    """Measure the dense model and each method, print the table, and add the rows to the JSON `file`.

    `methods` is name -> what its row says of it besides the figures, `heading` at least. A method that fails has its error
    for figures, and the others go on. Each row is written as soon as it is there.
    """
    os.environ["TQDM_DISABLE"] = "1"
    run = describe(inputs, packages)
    rows = _rows_so_far(file, run)
    for name in ("dense", *methods):
        rows[name] = dict(methods.get(name, {}))
        try:
            rows[name] |= in_own_process(measure, name, prune, inputs)
        except Exception as error:  # what a tool raises is its result
            traceback.print_exc()
            rows[name]["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
        print(name, json.dumps(rows[name]), flush=True)
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(run | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
    header, *body = cells(rows)
    table = Table(title=f"{run['windows']['calibration']} x {LENGTH} tokens of calibration", title_justify="left")
    for column in header:
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in body:
        table.add_row(*row)
    Console(width=140).print(table)
    if any("error" in rows[name] for name in methods):
        raise SystemExit(1)


def measure(name: str, prune: Prune, inputs: Path) -> dict[str, Any]:
    """Figures of one method: CPU seconds (user and system, all threads) of the pruning alone, without loading and evaluating."""
    model = AutoModelForCausalLM.from_pretrained(inputs, dtype=torch.float32).eval()
    calibration = [{"input_ids": batch} for batch in calibration_windows(inputs).split(BATCH_SIZE)]
    loaded = _peak_mib()
    started = time.process_time()
    pruned = model if name == "dense" else prune(name, model, calibration)
    seconds, peak = time.process_time() - started, _peak_mib()
    texts = {text: (mean_loss(pruned, ids), len(ids)) for text, ids in evaluation_windows(inputs).items()}
    everything = sum(loss * n for loss, n in texts.values()) / sum(n for _, n in texts.values())
    return {
        "perplexity": {text: math.exp(loss) for text, (loss, _) in texts.items()} | {"all": math.exp(everything)},
        "parameters": sum(parameter.numel() for parameter in pruned.parameters()),
        "zeros": share_of_zeros(pruned),
        "cpu_seconds": seconds,
        "peak_mib": peak,
        "peak_mib_loaded": loaded,
    }


@torch.no_grad()
def mean_loss(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """Of each token of `ids` (n_windows, LENGTH) after the first of its window, each window by itself."""
    model.eval()
    losses = [model(input_ids=batch, labels=batch).loss.double() * len(batch) for batch in ids.split(4)]
    return float(sum(losses)) / len(ids)


def share_of_zeros(model: torch.nn.Module) -> float:
    """Among the weights of all matrices but embeddings and the output head."""
    tables = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    skipped = {id(module.weight) for module in (*tables, model.get_output_embeddings())}
    matrices = [weight for weight in model.parameters() if weight.ndim == 2 and id(weight) not in skipped]
    return sum(int((weight == 0).sum()) for weight in matrices) / sum(weight.numel() for weight in matrices)


def in_own_process(function: Callable, *arguments: Any) -> Any:
    """What `function` returns in a fresh process, whose peak memory is then its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def describe(inputs: Path, packages: Iterable[str]) -> dict[str, Any]:
    """All that a figure depends on besides the method."""
    with safe_open(inputs / WINDOWS, "pt") as windows:
        sizes = {name.removeprefix(EVALUATION): windows.get_slice(name).get_shape()[0] for name in windows.keys()}  # noqa: SIM118
        origin = windows.metadata()
    hashed = hashlib.sha256()
    for path in sorted(inputs.glob("*.safetensors")):
        with safe_open(path, "pt") as file:  # what is in it: a writer may order a file's header as it likes
            for name in sorted(file.keys()):
                hashed.update(f"{name} {file.get_slice(name).get_shape()}".encode())
                hashed.update(file.get_tensor(name).contiguous().view(torch.uint8).numpy())
    return {
        "inputs": hashed.hexdigest(),
        "windows": sizes,
        "origin": origin,
        "packages": {name: _version(name) for name in (*packages, "transformers", "torch")},
        "hardware": f"{os.cpu_count()}-core {platform.machine()} CPU (threads used: {torch.get_num_threads()})",
    }


def cells(rows: Mapping[str, dict]) -> list[list[str]]:
    """The table: a header, then a line for each row, perplexities as multiples of the dense model's."""
    dense = rows["dense"].get("perplexity")
    if dense is None:
        raise SystemExit(f"the dense model can't be measured: {rows['dense']['error']}")
    lines = [["method", *dense, "parameters", "zeros", "CPU seconds", "peak MiB"]]
    for name, row in rows.items():
        if "error" in row:
            lines.append([name, row["error"], *[""] * (len(lines[0]) - 2)])
            continue
        values, is_dense = row["perplexity"], row is rows["dense"]
        perplexities = [f"{values[text]:.2f}" if is_dense else f"{values[text] / dense[text]:.3f}×" for text in dense]
        cost = ["", ""] if is_dense else [f"{row['cpu_seconds']:.0f}", f"{row['peak_mib']:,.0f}"]
        lines.append([name, *perplexities, f"{row['parameters']:,}", f"{row['zeros']:.1%}", *cost])
    return lines


def _rows_so_far(file: Path | None, run: Mapping) -> dict[str, dict]:
    """Rows that an earlier run left in `file`, if it was the same but for the methods."""
    if file is None or not file.exists():
        return {}
    found = json.loads(file.read_text(encoding="utf-8"))
    rows = found.pop("rows")
    if differing := [key for key in run if run[key] != found.get(key)]:
        raise SystemExit(
            f"{file} holds another run, with different {', '.join(differing)}: remove it, or name another file"
        )
    return rows


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        raise SystemExit(
            f"{package} is not installed in this environment; the head of the script says what is"
        ) from None


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB on Linux
