"""Run by the tests of several processes: `torchrun … program.py OUTPUT_DIR`, or by plain python."""

import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from hf_prune import Pruner, make_plan
from hf_prune.apply.masks import masks_of
from hf_prune.structure.inputs import example_inputs
from tests import zoo
from tests.processes import run
from tests.training.data import RECIPE, Tokens, trainer


# also a layer, bypassed while masked: its parameters take part in no step, and both ranks must wait for none
WITH_LAYER = {**RECIPE, "prune": [{"target": "layers", "sparsity": 0.34, "criterion": "activation"}, *RECIPE["prune"]]}
CRITERIA = ("l2", "random", "gradient", "taylor", "activation")


def model():
    return zoo.build("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def write(masks, name):
    tensors = {f"units|{key}": keep for key, keep in masks.units.items()}
    tensors |= {f"weights|{key}": keep for key, keep in masks.weights.items()}
    save_file(tensors, Path(sys.argv[1]) / f"{name}-of-{world}-rank{rank}.safetensors")


def plan():
    for name in ("bert", "llama"):
        one = zoo.build(name)
        batches = [example_inputs(one, seed=seed) for seed in range(5)]
        if name == "bert":
            batches = [
                {**batch, "labels": torch.tensor([n % 2] * len(batch["input_ids"]))} for n, batch in enumerate(batches)
            ]
        for criterion in CRITERIA:
            of_weights = "l1" if criterion == "activation" else criterion  # not defined for weights
            recipe = {
                "version": 1,
                "prune": [
                    {"target": "ffn_neurons", "sparsity": 0.5, "criterion": criterion, "scope": "global"},
                    {"target": "attention_heads", "sparsity": 0.5, "criterion": criterion},
                    {"target": "weights", "sparsity": 0.5, "criterion": of_weights, "scope": "global"},
                ],
            }
            write(make_plan(one, recipe, calibration=batches).masks, f"plan-{name}-{criterion}")


def train():
    run = trainer(
        Path(sys.argv[1]) / f"run-{world}",
        model=model(),
        recipe={**WITH_LAYER, "schedule": {**RECIPE["schedule"], "shrink": "never"}},
        per_device_train_batch_size=4 // world,
        average_tokens_across_devices=False,
        save_strategy="steps",
        save_steps=8,
    )
    run.train()
    write(masks_of(run.model), "train")


def shrink():
    run = trainer(
        Path(sys.argv[1]) / f"shrunk-run-{world}",
        model=model(),
        recipe=WITH_LAYER,
        per_device_train_batch_size=4 // world,
        gradient_accumulation_steps=2,
    )
    run.train()
    run.evaluate()
    run.save_model(Path(sys.argv[1]) / f"saved-{world}")
    save_file(
        {name: tensor.clone() for name, tensor in run.model.state_dict().items()},
        Path(sys.argv[1]) / f"shrunk-of-{world}-rank{rank}.safetensors",
    )


def loop():
    accelerator = Accelerator(cpu=True)
    one = model().train()
    optimizer = torch.optim.AdamW(one.parameters(), lr=1e-3)
    data = DataLoader(Tokens(), batch_size=4 // world)
    prepared, optimizer, data = accelerator.prepare(one, optimizer, data)
    calibration = list(DataLoader(Tokens(), batch_size=4))[:2]
    pruner = Pruner(prepared, optimizer, RECIPE, n_steps=len(data), calibration=calibration)
    for batch in data:
        accelerator.backward(prepared(**batch).loss)
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
    write(masks_of(one), "loop")
    pruner.finish()


def movement():
    """A loop with gradient accumulation and clipping: what is gathered before the last update, and the masks after it."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    one = model().train()
    optimizer = torch.optim.AdamW(one.parameters(), lr=1e-3)
    prepared, optimizer, data = accelerator.prepare(one, optimizer, DataLoader(Tokens(), batch_size=4 // world))
    steps = [
        {"target": "ffn_neurons", "sparsity": 0.5, "criterion": "movement", "scope": "global"},
        {"target": "weights", "sparsity": 0.6, "criterion": "movement"},
    ]
    pruner = Pruner(prepared, optimizer, {**RECIPE, "prune": steps}, n_steps=4)
    for batch in data:
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(**batch).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(prepared.parameters(), 0.5)
            optimizer.step()
            pruner.step()
            optimizer.zero_grad()
    write(masks_of(one), "movement")
    gathered = {name: sums for name, sums in pruner.state_dict()["tensors"].items() if name.startswith("movement|")}
    save_file(gathered, Path(sys.argv[1]) / f"gathered-of-{world}-rank{rank}.safetensors")


if __name__ == "__main__":
    # the functions above read them as they are here
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    run(lambda rank, world: [what() for what in (plan, train, shrink, loop, movement)])
