"""Other tools by the protocol of quality.py: llm-compressor and optipfair, on the model and windows that it wrote.

    python benchmarks/quality.py --inputs outputs/benchmark --json benchmarks/results/quality.json
    python benchmarks/rivals.py --inputs outputs/benchmark --json benchmarks/results/rivals.json

They want a version of Transformers of their own, so the second runs in an environment of its own, without hf_prune:
`pip install torch==2.13.0`, then `pip install llmcompressor optipfair typer`. Each is called as its documentation says, with its
defaults for what the protocol leaves open.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import common
import torch
import typer
from torch.utils.data import DataLoader
from transformers import PreTrainedModel


def magnitude(model: PreTrainedModel, calibration: common.Batches, **options: object) -> PreTrainedModel:
    """The modifier's masks are applied after optimizer steps, which one shot hasn't: the weights stay as they are."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import MagnitudePruningModifier

    weights = [r"re:.*layers\..*_proj$"]  # it has no `ignore`
    schedule = {"start": 0.0, "end": 1.0, "init_sparsity": 0.5, "final_sparsity": 0.5}
    return oneshot(model=model, recipe=MagnitudePruningModifier(targets=weights, **schedule, **options))


def compress(modifier: str, model: PreTrainedModel, calibration: common.Batches, **options: object) -> PreTrainedModel:
    """By llm-compressor, in its default batches of one window."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers import pruning

    recipe = getattr(pruning, modifier)(sparsity=0.5, targets=["Linear"], ignore=["re:.*lm_head"], **options)
    windows = [{"input_ids": window} for batch in calibration for window in batch["input_ids"]]
    return oneshot(model=model, recipe=recipe, dataset=DataLoader(windows, batch_size=1))


def neurons(model: PreTrainedModel, calibration: common.Batches) -> torch.nn.Module:
    """Feed-forward neurons by optipfair's scores from data, equally many in each layer, for a fifth of the parameters."""
    from optipfair import prune_model

    mlps = [layer.mlp for layer in model.model.layers]
    d_ff = model.config.intermediate_size
    per_neuron = sum(parameter.numel() for mlp in mlps for parameter in mlp.parameters()) / d_ff
    n = round(0.2 * model.num_parameters() / per_neuron)
    percentage = 100 * (n + 0.5) / d_ff  # which it rounds down
    return prune_model(
        model, "MLP_GLU", "MAW", pruning_percentage=percentage, dataloader=calibration, show_progress=False
    )


def layers(share: float, model: PreTrainedModel, calibration: common.Batches) -> torch.nn.Module:
    """Those whose output is most like their input (block influence, Men et al. 2024), by optipfair."""
    from optipfair import analyze_layer_importance, prune_model

    scores = analyze_layer_importance(model, calibration, show_progress=False)
    least = sorted(scores, key=scores.__getitem__)[: round(share * len(scores))]
    return prune_model(model, "DEPTH", layer_indices=least, show_progress=False)


wanda, sparsegpt = (partial(compress, f"{name}Modifier") for name in ("WandaPruning", "SparseGPT"))
# name -> heading, function of model and calibration
METHODS = {
    "llm-compressor magnitude": (common.WEIGHTS, magnitude),
    "llm-compressor wanda": (common.WEIGHTS, wanda),
    "llm-compressor sparsegpt": (common.WEIGHTS, sparsegpt),
    "llm-compressor wanda 2:4": (common.N_OF_M, partial(wanda, mask_structure="2:4")),
    "llm-compressor sparsegpt 2:4": (common.N_OF_M, partial(sparsegpt, mask_structure="2:4")),
    "optipfair neurons": (common.STRUCTURED, neurons),
    "optipfair layers 10": (common.TENTH_OF_LAYERS, partial(layers, 0.1)),
    "optipfair layers 20": (common.FIFTH_OF_LAYERS, partial(layers, 0.2)),
}


def main(
    inputs: Annotated[Path, typer.Option(help="Directory that quality.py wrote.", exists=True)],
    methods: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(METHODS)}; all if none.")] = None,
    json: Annotated[Path | None, typer.Option(help="File for the figures; rows of the same run are added.")] = None,
) -> None:
    """Prune in one shot by other tools, and print perplexity as a multiple of the dense model's."""
    chosen = methods or list(METHODS)
    if unknown := [name for name in chosen if name not in METHODS]:
        raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join(METHODS)}")
    described = {name: {"heading": METHODS[name][0]} for name in chosen}
    common.measure_all(described, prune, inputs, ["llmcompressor", "optipfair"], json)


def prune(name: str, model: PreTrainedModel, calibration: common.Batches) -> torch.nn.Module:
    return METHODS[name][1](model, calibration)


if __name__ == "__main__":
    typer.run(main)
