"""A pruned model in another runtime computes what it computes in PyTorch; what can't be is said, and nothing is written."""

from __future__ import annotations

import json

import pytest
import torch

import hf_prune
from hf_prune.errors import PruneError, VerificationError
from hf_prune.export import runtimes
from hf_prune.export.runtimes import RUNTIMES, export, require_runtime
from hf_prune.structure.inputs import example_inputs
from tests import zoo


STEPS = [
    {"target": "attention_heads", "sparsity": 0.5, "scope": "global"},
    {"target": "ffn_neurons", "sparsity": 0.5, "scope": "global"},
]


def pruned(name="bert"):
    model = zoo.build(name)
    hf_prune.prune_(model, {"version": 1, "prune": STEPS})
    return model.eval()


def needs(name):
    for package in RUNTIMES[name].packages:
        pytest.importorskip(package, reason=f"{package} isn't installed: pip install 'hf_prune[export]'")
    pytest.importorskip("transformers.exporters")


# ExecuTorch lowers the smallest model for minutes, in several gigabytes
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name == "executorch" else name for name in RUNTIMES]


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("name", NAMES)
def test_the_file_computes_what_the_model_does_on_other_inputs_too(tmp_path, name, family):
    needs(name)
    from transformers.exporters import ExportedModel

    model, dense = pruned(family), zoo.build(family)
    found = export(model, name, tmp_path / "out", dense=dense, batch_size=2, length=8)
    assert found.max_difference <= 1e-4 and found.latency_ms.keys() == {"pruned", "dense"}
    written = json.loads((tmp_path / "out" / "export_report.json").read_text())
    assert written["latency_ms"] == found.latency_ms and str(tmp_path) not in json.dumps(written)
    program = ExportedModel.from_pretrained(tmp_path / "out").to(None, **RUNTIMES[name].run)
    inputs = {"input_ids": torch.randint(3, 90, (2, 8)), "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    inputs["attention_mask"][1, 6:] = 0
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).logits if family == "llama" else model(**inputs).logits
    rows = inputs["attention_mask"].bool() if family == "llama" else slice(None)
    torch.testing.assert_close(program(**inputs).logits[rows], expected[rows], rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "t5", "vit", "whisper"])
@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_other_families_with_sizes_that_differ_by_layer(tmp_path, name, family):
    needs(name)
    from transformers.exporters import ExportedModel

    model = pruned(family)
    assert model.config.hf_prune, "a stock config says its sizes"
    assert export(model, name, tmp_path / "out", batch_size=2, length=8).max_difference <= 1e-4
    program = ExportedModel.from_pretrained(tmp_path / "out").to(None, **RUNTIMES[name].run)
    inputs = {key: value for key, value in example_inputs(model, batch_size=2, length=8).items() if key != "labels"}
    inputs = {key: value.flip(0) if value.is_floating_point() else value for key, value in inputs.items()}
    with torch.no_grad():
        expected = model(**inputs, **({"use_cache": False} if hasattr(model.config, "use_cache") else {}))[0]
    found = next(value for value in program(**inputs).values() if isinstance(value, torch.Tensor))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_a_missing_package_and_an_unknown_format_are_said_first(monkeypatch):
    monkeypatch.setattr(runtimes, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(PruneError, match=r"needs onnxscript, which isn't installed.*hf_prune\[export\]"):
        require_runtime("onnx")
    with pytest.raises(PruneError, match="--format coreml: expected one of onnx, openvino, executorch, gguf"):
        require_runtime("coreml")


def test_what_is_there_is_not_written_over(monkeypatch, tmp_path):
    monkeypatch.setattr(runtimes, "find_spec", lambda name: object())
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(PruneError, match=r"isn't empty.*--output"):
        export(pruned(), "onnx", tmp_path)
    with pytest.raises(PruneError, match=r"in torch\.bfloat16; load it with dtype=torch\.float32"):
        export(pruned().to(torch.bfloat16), "onnx", tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


class Program:
    """Stands for an exported one that computes `shift` more."""

    def __init__(self, model, shift):
        self.model, self.shift = model, shift

    def __call__(self, **inputs):
        with torch.no_grad():
            return {"logits": self.model(**inputs).logits + self.shift}


def test_outputs_that_differ_are_refused():
    model = pruned()
    inputs = {"input_ids": torch.arange(3, 15).reshape(2, 6)}
    scale = float(Program(model, 0.0)(**inputs)["logits"].abs().max())
    assert runtimes._difference(model, Program(model, 5e-5 * scale), inputs) == pytest.approx(5e-5, rel=0.1)
    for shift in (2e-4 * scale, float("nan")):
        with pytest.raises(VerificationError, match="Nothing was written"):
            runtimes._difference(model, Program(model, shift), inputs)


def test_the_command_exports_beside_the_dense_model_of_the_report(tmp_path, monkeypatch):
    needs("onnx")
    from typer.testing import CliRunner

    from hf_prune.cli.main import app

    monkeypatch.chdir(tmp_path)
    zoo.build("bert").save_pretrained("base")
    pruned().save_pretrained("small")
    done = CliRunner().invoke(app, ["export", "small", "--format", "onnx", "--dense", "base", "--length", "8"])
    assert done.exit_code == 0, done.output
    assert done.output.startswith(
        "exporting to onnx, and the dense model beside it where it is known: this takes seconds"
    )
    assert "written to small-onnx" in done.output and "× as fast (input 1 × 8" in done.output
    assert (tmp_path / "small-onnx" / "model.onnx").exists()


def test_the_command_says_what_is_missing_before_it_looks_for_a_model(monkeypatch):
    from typer.testing import CliRunner

    from hf_prune.cli.main import app

    monkeypatch.setattr(runtimes, "find_spec", lambda name: None)
    done = CliRunner().invoke(app, ["export", "nowhere", "--format", "onnx"])
    assert isinstance(done.exception, PruneError) and "isn't installed" in str(done.exception)
