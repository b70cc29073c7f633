"""A training in processes of its own, to be compared, killed and resumed: `torchrun … job.py OUTPUT_DIR NAME OPTIONS`.

OPTIONS is JSON: `recipe`, `training` (of TrainingArguments), `model` (of the config), `resume`, and when to die: `kill_at`, the step
that no process survives, or `kill_in`, [step, name]: the first process dies half-way through the file of that name in the checkpoint
of that step. What training ended with is written to NAME-rankN.safetensors (weights), NAME-rankN.optimizer.pt and NAME.json.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import TrainerCallback

from tests import zoo
from tests.processes import run
from tests.training.data import RECIPE, trainer


LAYER = {"target": "layers", "sparsity": 0.34, "criterion": "random"}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def recipe(shrink, **schedule):
    """Masks are final after step 8 of 32: at least 20 follow."""
    return {
        **RECIPE,
        "prune": [LAYER, *RECIPE["prune"]],
        "schedule": {"name": "linear", "begin": 0.1, "end": 0.25, "updates": 2, "shrink": shrink, **schedule},
    }


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            die()


class Optimizer(TrainerCallback):
    """Keeps the optimizer's state as it is when the last step has been made."""

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                for value in optimizer.state[parameter].values():
                    assert value.numel() == 1 or value.shape == parameter.shape
        if state.global_step == state.max_steps:
            self.state = optimizer.state_dict()


def die_half_way(step, name):
    """Patch what writes files: `name` of the checkpoint of `step` is cut in half, and with it this process's life."""
    import safetensors.torch

    def cutting(write):
        def cut(what, path, *args, **kwargs):
            write(what, path, *args, **kwargs)
            path = Path(path)
            if path.name == name and f"checkpoint-{step}" in str(path):
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
                die()

        return cut

    torch.save = cutting(torch.save)
    safetensors.torch.save_file = cutting(safetensors.torch.save_file)
    import transformers.modeling_utils

    transformers.modeling_utils.safe_save_file = cutting(transformers.modeling_utils.safe_save_file)


def main(rank, world):
    directory, name, options = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    kept = Optimizer()
    callbacks = [kept]
    if "kill_at" in options:
        callbacks.append(KillAt(options["kill_at"]))
    if "kill_in" in options and rank == 0:
        die_half_way(*options["kill_in"])
    one = trainer(
        directory / options.get("run", name),
        model=zoo.build("bert", **options.get("model", {})),
        recipe=options["recipe"],
        callbacks=callbacks,
        **{
            "num_train_epochs": 4,
            "per_device_train_batch_size": 4 // world,
            "average_tokens_across_devices": False,
            **options.get("training", {}),
        },
    )
    one.train(resume_from_checkpoint=options.get("resume", False))
    save_file(
        {key: tensor.clone() for key, tensor in one.model.state_dict().items()},
        directory / f"{name}-rank{rank}.safetensors",
    )
    torch.save(kept.state, directory / f"{name}-rank{rank}.optimizer.pt")
    if rank == 0:
        report = one.pruning_report.to_dict()
        (directory / f"{name}.json").write_text(json.dumps({"log": one.state.log_history, "report": report}))


if __name__ == "__main__":
    run(main)
