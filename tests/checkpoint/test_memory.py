"""Loading takes no more memory than the checkpoint: at most 1.1 times its size, and 100 MB."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.checkpoint.shrunk import shrink_


ROOT = Path(__file__).parents[2]
# 96 M parameters before pruning: embeddings and output head of 16 M each, and eight blocks
CONFIG = dict(
    vocab_size=16000,
    hidden_size=1024,
    intermediate_size=2048,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    tie_word_embeddings=False,
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A checkpoint of some 340 MB, in shards, whose layers differ in size."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    assert shrink_(model, ("ffn_neurons", "attention_heads")).loads_with == "hf_prune"
    place = tmp_path_factory.mktemp("memory") / "model"
    model.save_pretrained(place, max_shard_size="100MB")
    return place


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "which"), [("float32", "resident"), ("bfloat16", "allocated")])
def test_peak_memory(dtype, which, directory):
    """As it is saved; and in another dtype, for which weights are copied out of the files that are mapped meanwhile."""
    size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    assert size > 200e6
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("peak_memory.py")), str(directory), dtype],
        env={"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    added = json.loads(done.stdout.splitlines()[-1])
    print(f"{dtype}: {added} of a checkpoint of {size} bytes")
    assert added[which] > size * (0.9 if dtype == "float32" else 0.45), "the weights aren't there"
    assert added[which] <= 1.1 * size + 100e6
