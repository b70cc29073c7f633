"""A small learnable data set and trainers on it, for the tests of training."""

import torch
from torch.utils.data import Dataset
from transformers import TrainingArguments

from hf_prune import PruningTrainer
from tests import zoo


RECIPE = {
    "version": 1,
    "prune": [
        {"target": "ffn_neurons", "sparsity": 0.5, "criterion": "taylor", "scope": "global"},
        {"target": "attention_heads", "sparsity": 0.25},
        {"target": "weights", "sparsity": 0.4},
    ],
    "schedule": {"name": "cubic", "begin": 0.1, "end": 0.7, "updates": 3},
    "calibration": {"samples": 8, "batch_size": 4},
}


class Tokens(Dataset):
    """Sequences whose class is the parity of their first token."""

    def __init__(self, n: int = 32, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(3, 99, (n, 10), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {
            "input_ids": self.ids[index],
            "attention_mask": torch.ones(10, dtype=torch.long),
            "labels": self.ids[index, 0] % 2,
        }


def arguments(directory, **options):
    defaults = dict(
        per_device_train_batch_size=4,
        num_train_epochs=2,
        learning_rate=1e-3,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_steps=1,
        use_cpu=True,
        seed=3,
        dataloader_pin_memory=False,
    )
    return TrainingArguments(output_dir=str(directory), **{**defaults, **options})


def trainer(directory, recipe=RECIPE, kind=PruningTrainer, model=None, **options):
    passed = ("callbacks", "optimizers", "calibration_dataset", "teacher_model")
    named = {name: options.pop(name) for name in passed if name in options}
    if kind is PruningTrainer or recipe is not None:
        named["recipe"] = recipe
    return kind(
        model=model if model is not None else zoo.build("bert"),
        args=arguments(directory, **options),
        train_dataset=Tokens(),
        eval_dataset=Tokens(seed=1),
        **named,
    )
