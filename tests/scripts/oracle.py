"""What the tests of the scripts compare with: models loaded again, and plain loops over the data as they lie on disk."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageClassification, AutoTokenizer
from transformers.models.auto.image_processing_auto import AutoImageProcessor

import hf_prune
from hf_prune.checkpoint import is_complete


PRUNED = {"README.md", "recipe.yaml", "pruning_report.json"}


def results(directory: Path, name: str = "all_results.json") -> dict[str, Any]:
    return json.loads((directory / name).read_text(encoding="utf-8"))


def load_pruned(auto: Any, directory: Path, base: Path) -> Any:
    """The model in `directory`, loaded as users do, once it is clear that it is whole and smaller than `base`."""
    assert hf_prune.__version__  # importing it is what lets the line below load sizes that differ by layer
    assert is_complete(directory)
    assert {path.name for path in directory.iterdir()} >= {"config.json", "model.safetensors", *PRUNED}
    model, dense = auto.from_pretrained(directory).eval(), auto.from_pretrained(base)
    sparsity = results(directory, "pruning_report.json")["sparsity"]
    assert sparsity == {"attention_heads": 0.25, "ffn_neurons": 0.5}
    assert model.num_parameters() < dense.num_parameters()
    return model


def read_news(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


@torch.no_grad()
def classify_news(model: Any, directory: Path, file: Path, max_length: int) -> tuple[list[str], list[str]]:
    """Text by text: the names of the predicted classes, and of the true ones."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    predicted, true = [], []
    for row in read_news(file):
        inputs = tokenizer(row["text"], truncation=True, max_length=max_length, return_tensors="pt")
        predicted.append(model.config.id2label[int(model(**inputs).logits.argmax())])
        true.append(row["label"])
    return predicted, true


@torch.no_grad()
def classify_digits(directory: Path, folder: Path) -> tuple[list[str], list[str]]:
    """Image by image: the names of the predicted classes, and of the true ones."""
    model = AutoModelForImageClassification.from_pretrained(directory).eval()
    processor = AutoImageProcessor.from_pretrained(directory)
    predicted, true = [], []
    for file in sorted(folder.rglob("*.png")):
        inputs = processor(Image.open(file).convert("RGB"), return_tensors="pt")
        predicted.append(model.config.id2label[int(model(**inputs).logits.argmax())])
        true.append(file.parent.name)
    return predicted, true


def share_equal(predicted: list[str], true: list[str]) -> float:
    return sum(p == t for p, t in zip(predicted, true, strict=True)) / len(true)


def token_blocks(directory: Path, file: Path, size: int) -> torch.Tensor:
    """The file's tokens, line by line with their breaks, in rows of `size`; the rest left out."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    with file.open(encoding="utf-8", newline="") as lines:
        ids = [token for line in lines for token in tokenizer(line)["input_ids"]]
    n_blocks = len(ids) // size
    return torch.tensor(ids[: n_blocks * size]).reshape(n_blocks, size)


@torch.no_grad()
def mean_loss(model: Any, blocks: torch.Tensor) -> float:
    """Of the next token, over all positions of all blocks."""
    total, n_tokens = 0.0, 0
    for block in blocks:
        log_probabilities = model(block[None]).logits[0, :-1].double().log_softmax(-1)
        total -= float(log_probabilities.gather(1, block[1:, None]).sum())
        n_tokens += len(block) - 1
    return total / n_tokens
