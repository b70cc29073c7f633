"""Tiny models with tokenizer or image processor, and data that they can learn, written into a folder."""

from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from tests import zoo


WORDS = [f"w{number}" for number in range(90)]
SPECIAL = ["[PAD]", "[BOS]", "[EOS]", "[UNK]"]
TRAINING = {
    "max_steps": 10,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "use_cpu": True,
}
PRUNE = [
    {"target": "attention_heads", "sparsity": 0.25, "scope": "global"},
    {"target": "ffn_neurons", "sparsity": 0.5, "criterion": "taylor", "scope": "global"},
]


def text_model(directory: Path, name: str = "bert", **changes: Any) -> Path:
    """`zoo.build(name)` with a tokenizer of `WORDS`."""
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]", unk_token="[UNK]"
    )
    zoo.build(name, **changes).save_pretrained(directory)
    fast.save_pretrained(directory)
    return directory


def image_model(directory: Path) -> Path:
    from transformers import ViTConfig, ViTForImageClassification

    ViTForImageClassification(ViTConfig(**zoo.VISION)).save_pretrained(directory)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(directory)
    return directory


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def texts(path: Path, n: int = 60) -> Path:
    """The class of a text is that of its first word."""
    chance = random.Random(0)
    rows = []
    for number in range(n):
        words = [WORDS[number % 2 * 40], *chance.choices(WORDS, k=7)]
        rows.append({"text": " ".join(words), "label": ("sport", "tech")[number % 2]})
    return write_csv(path, rows)


def images(directory: Path, n: int = 16) -> Path:
    """One folder a class: dark pictures, bright pictures."""
    chance = np.random.default_rng(0)
    for name, level in (("dark", 40), ("bright", 200)):
        (directory / name).mkdir(parents=True)
        for number in range(n):
            pixels = (level + chance.integers(0, 50, (16, 16, 3))).astype("uint8")
            Image.fromarray(pixels).save(directory / name / f"{number}.png")
    return directory


def write_recipe(path: Path, **changes: Any) -> Path:
    """A recipe for the text model and data beside it; `changes` are top-level keys, None drops one."""
    document: dict[str, Any] = {
        "version": 1,
        "name": "tiny",
        "model": {"name_or_path": str(path.parent / "model"), "task": "text-classification"},
        "data": {"name_or_path": str(path.parent / "data.csv"), "max_length": 8},
        "output": {"dir": str(path.parent / "out")},
        "training": TRAINING,
        "prune": PRUNE,
        "schedule": {"begin": 0.1, "end": 0.5, "updates": 2},
        "calibration": {"samples": 8, "length": 8, "batch_size": 4},
        **changes,
    }
    kept = {key: value for key, value in document.items() if value is not None}
    path.write_text(yaml.safe_dump(kept, sort_keys=False), encoding="utf-8")
    return path
