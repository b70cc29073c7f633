"""Pruned checkpoints in real environments that have PyTorch and Transformers and no hf_prune."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hf_prune.structure.inputs import example_inputs
from tests import zoo
from tests.checkpoint.shrunk import shrink_


ROOT = Path(__file__).parents[2]
# (name, how it is cut): unevenly and without parts of layers no stock config can say
CASES = [(name, how) for name in ("bert", "gpt2", "llama", "t5", "vit") for how in ("uneven", "even")]
CASES += [(name, "parts") for name in ("bert", "gpt2", "llama", "bloom")]
TARGETS = {
    "uneven": ("ffn_neurons", "attention_heads", "layers"),
    "even": ("ffn_neurons", "layers"),
    "parts": ("layers.attention", "layers.feed_forward"),
}


def pinned(constraints, package):
    return re.search(rf"^{package}==(.+)$", (ROOT / constraints).read_text(), re.MULTILINE)[1]


@pytest.fixture
def saved(tmp_path):
    """A directory with every case, saved here, and what it computed here."""
    for name, how in CASES:
        model = zoo.build(name)
        verdict = shrink_(model, TARGETS[how], how == "uneven")
        assert (verdict.loads_with == "hf_prune") == (how != "even")
        place = tmp_path / "models" / f"{name}-{how}"
        model.save_pretrained(place / "model")
        model.save_pretrained(place / "sharded", max_shard_size="10KB")
        assert len(list((place / "sharded").glob("model-*.safetensors"))) > 1
        inputs = example_inputs(model)
        with torch.no_grad():
            expected = model.eval()(**inputs)[0].contiguous()
        save_file({**inputs, "expected": expected}, place / "outputs.safetensors")
        facts = {
            "auto": zoo.MODELS[name][2].__name__,
            "manifest": how != "even",
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        }
        (place / "facts.json").write_text(json.dumps(facts))
    return tmp_path / "models"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("which", "directory", "constraints"),
    [
        ("newest", ".venv-without", "constraints.txt"),
        ("oldest", ".venv-without-oldest", "constraints-oldest.txt"),
    ],
)
def test_loads_where_hf_prune_is_not_installed(which, directory, constraints, saved, tmp_path):
    make = f"set -euo pipefail; source scripts/_environment.sh; make_bare_environment {which}"
    subprocess.run(["bash", "-c", make], cwd=ROOT, check=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    program = Path(__file__).with_name("loads.py")
    done = subprocess.run(
        [ROOT / directory / "bin" / "python", program, saved],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["transformers"] == pinned(constraints, "transformers")
    assert len(said["checked"]) == len(CASES)
    assert torch.__version__.split("+")[0] == pinned(constraints, "torch")
