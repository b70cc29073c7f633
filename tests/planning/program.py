"""Run by the test of two processes: `torchrun … program.py OUTPUT_DIR`, or by plain python."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from hf_prune import make_plan
from hf_prune.calibration import collect
from hf_prune.structure import inspect_model
from tests import zoo
from tests.calibration.test_collect import NEEDS
from tests.criteria.test_contract import labelled
from tests.processes import run


REPAIR = {"compensation": "least_squares"}
LAYERS = {"target": "layers", "remove": [1]}
NEURONS = {"target": "ffn_neurons", "sparsity": 0.5}
# name -> (steps, how many batches of calibration: 1 leaves the second process without any)
RECIPES = {
    "fisher": ([{**NEURONS, "criterion": "fisher"}, {"target": "layers", "sparsity": 0.34, "criterion": "fisher"}], 5),
    "fluctuation": ([{**NEURONS, "criterion": "fluctuation"}], 5),
    "apoz": ([{**NEURONS, "criterion": "apoz"}], 5),
    "wanda": ([{"target": "weights", "sparsity": 0.5, "criterion": "wanda", "scope": "output"}], 5),
    "ria": ([{"target": "weights", "criterion": "ria", "pattern": "2:4"}], 5),
    "loss_change": ([{"target": "layers", "sparsity": 0.67, "criterion": "loss_change"}], 5),
    "least_squares": ([{**NEURONS, **REPAIR}, {"target": "attention_heads", "sparsity": 0.5, **REPAIR}], 5),
    "least_squares-one": ([{**NEURONS, **REPAIR}], 1),
    "least_squares-new-biases": ([{**NEURONS, "compensation": {"name": "least_squares", "add": True}}], 5),
    "least_squares-self_generated": ([{**NEURONS, "criterion": "activation", **REPAIR}], 5),
    "reconstruct": ([{**NEURONS, "compensation": {"name": "reconstruct", "epochs": 2, "learning_rate": 0.002}}], 5),
    "reconstruct-one": ([{**NEURONS, "compensation": {"name": "reconstruct", "learning_rate": 0.002}}], 1),
    "linear": ([{**LAYERS, "compensation": "linear"}], 5),
    "sparsegpt": ([{"target": "weights", "sparsity": 0.5, "criterion": "sparsegpt"}], 5),
    "sparsegpt-dense": (
        [{"target": "weights", "pattern": "2:4", "criterion": {"name": "sparsegpt", "dense_target": True}}],
        5,
    ),
    "sparsegpt-one": ([{"target": "weights", "sparsity": 0.5, "criterion": "sparsegpt"}], 1),
    "sparsegpt-outside": ([{"target": "weights", "sparsity": 0.5, "criterion": "sparsegpt"}], 5),
    "loss_change-one": ([{"target": "layers", "sparsity": 0.34, "criterion": "loss_change"}], 1),
    "loss_change-heads": (
        [{"target": "attention_heads", "sparsity": 0.5, "criterion": "loss_change", "scope": "global"}],
        5,
    ),
    "angular": ([{"target": "layers", "sparsity": 0.67, "criterion": "angular"}], 5),
    "angular-one": ([{"target": "layers", "sparsity": 0.67, "criterion": "angular"}], 1),
    "combined": ([{**NEURONS, "criterion": {"name": "combined", "of": {"activation": 0.7, "taylor": 0.3}}}], 5),
}
CALIBRATION = {"least_squares-self_generated": {"self_generated": 40, "length": 12}}
MODELS = {"sparsegpt-outside": "electra"}  # the others: llama


def main(directory, rank, world):
    for name, (steps, n_batches) in RECIPES.items():
        model = zoo.build(MODELS.get(name, "llama"))
        batches = labelled("llama", n_batches=n_batches, size=4, padded=True)
        recipe = {"version": 1, "prune": steps, "calibration": CALIBRATION.get(name, {})}
        plan = make_plan(model, recipe, calibration=batches)
        tensors = {**plan.mask_tensors(), **{f"new|{key}": value for key, value in plan.replacements.items()}}
        save_file(tensors, directory / f"{name}-of-{world}-rank{rank}.safetensors")
    model = zoo.build("llama")
    structure, batches = inspect_model(model), labelled("llama", n_batches=5, size=4, padded=True)
    found = collect(model, batches, NEEDS, [*structure.sites, *structure.weights])
    statistics = {f"{need}|{key}": value for need in NEEDS for key, value in getattr(found, need).items()}
    statistics["counts"] = torch.tensor([found.n_samples, found.n_labels])
    save_file(statistics, directory / f"statistics-of-{world}-rank{rank}.safetensors")


if __name__ == "__main__":
    run(lambda rank, world: main(Path(sys.argv[1]), rank, world))
