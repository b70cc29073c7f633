"""Pruned checkpoints without hf_prune: in this environment, where it is hidden, and in real ones that don't have it."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from hf_prune.structure.inputs import example_inputs
from tests import zoo
from tests.checkpoint.shrunk import shrink_
from tests.environments.loads import DECODING, WAYS, generated


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


def save(directory, cases):
    """Write every case, and what it computes here."""
    for name, how in cases:
        model = zoo.build(name)
        verdict = shrink_(model, TARGETS[how], how == "uneven")
        assert (verdict.loads_with == "hf_prune") == (how != "even")
        place = directory / f"{name}-{how}"
        model.save_pretrained(place / "model")
        model.save_pretrained(place / "sharded", max_shard_size="10KB")
        assert len(list((place / "sharded").glob("model-*.safetensors"))) > 1
        inputs = example_inputs(model)
        with torch.no_grad():
            expected = model.eval()(**inputs)[0].contiguous()
        tokens = {}
        if zoo.MODELS[name][2] is AutoModelForCausalLM:
            tokens = {f"generated_{beams}": generated(model, inputs, num_beams=beams).contiguous() for beams in (1, 3)}
        save_file({**inputs, **tokens, "expected": expected}, place / "outputs.safetensors")
        facts = {
            "auto": zoo.MODELS[name][2].__name__,
            "manifest": how != "even",
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        }
        (place / "facts.json").write_text(json.dumps(facts))


def run(python, directory, tmp_path):
    """What `loads.py` says of the models under `directory`."""
    program = Path(__file__).with_name("loads.py")
    hidden = f"import runpy, sys; sys.modules['hf_prune'] = None; sys.argv[0] = {str(program)!r}"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [python, "-c", f"{hidden}; runpy.run_path(sys.argv[0], run_name='__main__')", directory],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_way_of_loading_where_hf_prune_is_hidden(tmp_path):
    cases = [(name, "uneven") for name in ("bert", "llama", "vit")]
    save(tmp_path / "models", cases)
    checked = run(sys.executable, tmp_path / "models", tmp_path)["checked"]
    assert len(checked) == len(cases)
    here = [way for way, (package, _) in WAYS.items() if package is None or find_spec(package)]
    assert checked["llama-uneven"] == [*here, *DECODING]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("which", "directory", "constraints"),
    [
        ("newest", ".venv-without", "constraints.txt"),
        ("oldest", ".venv-without-oldest", "constraints-oldest.txt"),
    ],
)
def test_loads_where_hf_prune_is_not_installed(which, directory, constraints, tmp_path):
    save(tmp_path / "models", CASES)
    make = f"set -euo pipefail; source scripts/_environment.sh; make_bare_environment {which}"
    subprocess.run(["bash", "-c", make], cwd=ROOT, check=True)
    said = run(ROOT / directory / "bin" / "python", tmp_path / "models", tmp_path)
    assert said["transformers"] == pinned(constraints, "transformers")
    assert len(said["checked"]) == len(CASES)
    assert torch.__version__.split("+")[0] == pinned(constraints, "torch")
