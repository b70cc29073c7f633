"""Run by the test of two processes: `torchrun … program.py OUTPUT_DIR`, or by plain python."""

import sys
from pathlib import Path

import torch

from hf_prune import make_plan
from hf_prune.sensitivity import scan
from tests import zoo
from tests.criteria.test_contract import labelled
from tests.processes import run


STEPS = {
    "owl": {"target": "weights", "sparsity": 0.5, "criterion": "wanda", "allocation": "owl"},
    "kind": {
        "target": "ffn_neurons",
        "sparsity": 0.5,
        "scope": "global",
        "allocation": "kind",
        "criterion": "activation",
    },
}


def main(directory, rank, world):
    model, batches = zoo.build("llama"), labelled("llama", n_batches=3, size=2, padded=True)
    scan(model, batches, sparsities=(0.25, 0.5), targets=["layers", "ffn_neurons"], samples=5).to_json(
        directory / f"curves-of-{world}-rank{rank}.json"
    )
    for name, step in STEPS.items():
        plan = make_plan(model, {"version": 1, "prune": [step]}, calibration=batches)
        torch.save(plan.mask_tensors(), directory / f"{name}-of-{world}-rank{rank}.pt")


if __name__ == "__main__":
    run(lambda rank, world: main(Path(sys.argv[1]), rank, world))
