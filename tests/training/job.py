"""A training in processes of its own, to be compared, killed and resumed: `torchrun … job.py OUTPUT_DIR NAME OPTIONS`.

OPTIONS is JSON: `recipe`, `training` (of TrainingArguments), `model` (of the config), `teacher` (its seed), `resume`, and when to die: `kill_at`, the step
that no process survives, or `kill_in`, [step, name]: the first process dies half-way through the file of that name in the checkpoint
of that step. Before the step `wait_at` all wait for a file `go`. What training ended with is written to NAME-rankN.safetensors (weights),
NAME-rankN.optimizer.pt (unless sharded), NAME.json, and as a checkpoint to NAME-saved.
"""

import copy
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from transformers import TrainerCallback, TrainerState, modeling_utils

from hf_prune.apply.masks import masked_tensors
from tests import zoo
from tests.processes import run
from tests.training.data import RECIPE, trainer


LAYER = {"target": "layers", "sparsity": 0.34, "criterion": "random"}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def recipe(shrink, **schedule):
    """Masks are final after step 8 of 32: at least 20 follow."""
    return {
        **RECIPE,
        "prune": [LAYER, *copy.deepcopy(RECIPE["prune"])],
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


class WaitAt(TrainerCallback):
    def __init__(self, step, directory, rank):
        self.step, self.directory, self.rank = step, directory, rank

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            (self.directory / f"waits-{self.rank}").touch()
            while not (self.directory / "go").exists():
                time.sleep(0.1)


class Held(TrainerCallback):
    """At every step, what the masks say has left is zero on the whole parameters; counts the steps at which something had."""

    n_steps = 0

    def on_step_end(self, args, state, control, **kwargs):
        pruner = self.trainer.pruner
        for entry, _ in masked_tensors(pruner.model):
            assert not entry.values(pruner._full(entry.name)).any(), (entry.name, state.global_step)
        self.n_steps += any(True for _ in masked_tensors(pruner.model))


def allow_fsdp_on_cpu():
    """Accelerate takes FSDP for a matter of accelerators, and would fall back on DDP without a word."""
    stock = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        stock(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        self.fsdp_plugin = fsdp_plugin or self.__dict__.get("fsdp_plugin")
        if self.fsdp_plugin is not None:
            self.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = init


def allow_deepspeed_on_cpu():
    """And DeepSpeed: it would start as many trainings of one process each, or none where it is told to take the CPU."""
    os.environ.pop("ACCELERATE_USE_CPU", None)
    stock = PartialState._prepare_backend

    def prepare_backend(self, *args, **kwargs):
        if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
            return "gloo", DistributedType.MULTI_CPU
        return stock(self, *args, **kwargs)

    PartialState._prepare_backend = prepare_backend


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
    """From now on the file `name` in the checkpoint of `step` is cut in half, and with it this process's life."""

    def cutting(write):
        def cut(what, path, *args, **kwargs):
            write(what, path, *args, **kwargs)
            path = Path(path)
            if path.name == name and f"checkpoint-{step}" in str(path):
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
                die()

        return cut

    torch.save = cutting(torch.save)
    modeling_utils.safe_save_file = cutting(modeling_utils.safe_save_file)
    TrainerState.save_to_json = cutting(TrainerState.save_to_json)


def main(rank, world):
    directory, name, options = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    training = options.get("training", {})
    is_sharded = "fsdp" in training or "deepspeed" in training
    allow_fsdp_on_cpu()
    if "deepspeed" in training:
        allow_deepspeed_on_cpu()
    kept = Held() if is_sharded else Optimizer()
    callbacks = [kept]
    if "kill_at" in options:
        callbacks.append(KillAt(options["kill_at"]))
    if "wait_at" in options:
        callbacks.append(WaitAt(options["wait_at"], directory, rank))
    if "kill_in" in options and rank == 0:
        die_half_way(*options["kill_in"])
    one = kept.trainer = trainer(
        directory / options.get("run", name),
        model=zoo.build("bert", **options.get("model", {})),
        recipe=options["recipe"],
        callbacks=callbacks,
        teacher_model=zoo.build("bert", seed=options["teacher"]) if "teacher" in options else None,
        **{
            "num_train_epochs": 4,
            "per_device_train_batch_size": 4 // world,
            "average_tokens_across_devices": False,
            **training,
        },
    )
    assert one.args.world_size == world
    one.train(resume_from_checkpoint=options.get("resume", False))
    save_file(
        {key: tensor.clone() for key, tensor in one.model.state_dict().items()},
        directory / f"{name}-rank{rank}.safetensors",
    )
    if not is_sharded:
        torch.save(kept.state, directory / f"{name}-rank{rank}.optimizer.pt")
    told = {"evaluated": one.evaluate(), "log": one.state.log_history, "report": one.pruning_report.to_dict()}
    one.save_model(directory / f"{name}-saved")
    if rank == 0:
        told["n_steps_held"] = getattr(kept, "n_steps", None)
        (directory / f"{name}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    run(main)
