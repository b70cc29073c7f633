"""A directory in which what the pages say can be run: tiny models stand in for those that they name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import hf_prune
from tests import zoo
from tests.docs.pages import README, ROOT, blocks
from tests.job import inputs


# Hub id in the pages -> tiny model of the same layout
HUB_MODELS = {"HuggingFaceTB/SmolLM2-135M": "llama"}
# sizes in the pages -> sizes that take no time
SIZES = {
    "num_hidden_layers=6, hidden_size=384, num_attention_heads=12, intermediate_size=1536": (
        "num_hidden_layers=2, hidden_size=16, num_attention_heads=2, intermediate_size=8, vocab_size=99"
    ),
    "torch.randint(5, 30000, (8, 64))": "torch.randint(5, 99, (1, 4))",
}


class Stage:
    """The directory, and how the text of the pages is made to fit it."""

    def __init__(self, directory: Path):
        self.directory = directory
        for name, model in HUB_MODELS.items():
            inputs.text_model(directory / "hub" / name, model)
        (directory / "texts.txt").write_text("\n".join([" ".join(inputs.WORDS)] * 8), encoding="utf-8")
        (directory / "recipes").symlink_to(ROOT / "recipes")
        (recipe,) = (block for block in blocks(README) if block.language == "yaml")
        (directory / "recipe.yaml").write_text(recipe.text, encoding="utf-8")

    def fit(self, text: str) -> str:
        """Names and sizes replaced by what is at hand; an unknown Hub id stays, and fails for want of a network."""
        for name in HUB_MODELS:
            text = text.replace(name, str(self.directory / "hub" / name))
        for large, small in SIZES.items():
            text = text.replace(large, small)
        return text

    def save_pruned(self, name: str) -> None:
        """A pruned model, where the pages speak of one that an earlier command has left."""
        torch.manual_seed(0)
        model = zoo.build("bert")
        hf_prune.prune_(model, {"version": 1, "prune": [{"target": "attention_heads", "sparsity": 0.25}]})
        model.save_pretrained(self.directory / name)


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return Stage(tmp_path)
