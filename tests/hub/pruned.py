"""Pruned models with what lies beside them, and how what was pushed is loaded back."""

from __future__ import annotations

import textwrap
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import hf_prune
from tests import zoo
from tests.hub_server import HubServer
from tests.processes import python


UNEVEN = {
    "version": 1,
    "name": "uneven",
    "description": "Half the neurons, where they matter least.",
    "prune": [{"target": "ffn_neurons", "sparsity": 0.5, "scope": "global"}],
}
STOCK = {"version": 1, "prune": [{"target": "ffn_neurons", "sparsity": 0.5, "uniform": True}]}
INPUTS = {"input_ids": torch.arange(3, 15).reshape(2, 6)}
FILES = {"config.json", "model.safetensors", "recipe.yaml", "pruning_report.json", "README.md"}


def pruned(recipe=UNEVEN, name="bert"):
    """The tiny model, pruned by `recipe`: with a manifest under UNEVEN, a stock one under STOCK."""
    model = zoo.build(name)
    hf_prune.prune_(model, recipe)
    return model


def contents(directory):
    """What each file holds, by name."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def tokenizer():
    """One that splits at spaces, made here: no download."""
    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "hello": 3, "hub": 4}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")


def logits(model):
    with torch.no_grad():
        return model.eval()(**INPUTS).logits


def logits_without_hf_prune(repo_id: str, hub: HubServer, home: Path, auto: str, **options: object) -> torch.Tensor:
    """Of the model that a process in which `import hf_prune` is an error loads from the Hub with remote code."""
    program = textwrap.dedent(
        f"""
        import sys
        sys.modules["hf_prune"] = None
        import torch, transformers
        model = transformers.{auto}.from_pretrained({repo_id!r}, trust_remote_code=True, **{options!r}).eval()
        with torch.no_grad():
            torch.save(model(input_ids=torch.arange(3, 15).reshape(2, 6)).logits, {str(home / "logits.pt")!r})
        """
    )
    home.mkdir()
    done = python("-c", program, folder=home, **hub.env(home))
    assert done.returncode == 0, done.stderr
    return torch.load(home / "logits.pt")
