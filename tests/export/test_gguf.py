"""GGUF: Transformers reads the same logits out of it, llama.cpp computes them; what can't be said is said first."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import hf_prune
from hf_prune.cli.main import app
from hf_prune.errors import PruneError, UnsupportedModelError, VerificationError
from hf_prune.export import gguf as export_of
from hf_prune.export.gguf import FILE, export_gguf, require_writable
from tests import zoo
from tests.export.llama_cpp import last_logits


gguf = pytest.importorskip("gguf", reason="gguf isn't installed: pip install gguf")

HALF = [{"target": "ffn_neurons", "sparsity": 0.5, "uniform": True}]
UNEVEN = [
    {"target": "attention_heads", "remove": {"*.layers.0.*": [1]}},
    {"target": "ffn_neurons", "sparsity": 0.5, "scope": "global"},
]
# model, steps -> architecture
WRITTEN = {
    "dense": ("llama", [], "llama"),
    "narrower": ("llama", HALF, "llama"),
    "shallower": ("mistral", [{"target": "layers", "remove": [1]}], "llama"),
    "with biases": ("qwen2", HALF, "qwen2"),
    "uneven": ("llama", UNEVEN, "deci"),
}
IDS = list(range(3, 15))


def pruned(name="llama", steps=HALF):
    model = zoo.build(name).eval()
    if steps:
        hf_prune.prune_(model, {"version": 1, "prune": steps})
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(torch.tensor([IDS])).logits[0]


@pytest.mark.parametrize("case", WRITTEN)
def test_the_file_holds_the_model(tmp_path, case):
    name, steps, architecture = WRITTEN[case]
    model = pruned(name, steps)
    written = export_gguf(model, tmp_path / "out")
    assert written.architecture == architecture
    assert json.loads((tmp_path / "out" / "export_report.json").read_text())["architecture"] == architecture
    if architecture == "deci":
        assert written.max_difference is None
        fields = gguf.GGUFReader(tmp_path / "out" / FILE).fields
        said = {key: fields[f"deci.{key}"].contents() for key in ("attention.head_count_kv", "feed_forward_length")}
        widths = [layer.mlp.gate_proj.out_features for layer in model.model.layers]
        assert said == {"attention.head_count_kv": [1, 2, 2], "feed_forward_length": widths} and len(set(widths)) > 1
    else:
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file=FILE, dtype=torch.float32)
        torch.testing.assert_close(logits(again.eval()), logits(model), rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", WRITTEN)
def test_llama_cpp_computes_the_same(tmp_path, case):
    pytest.importorskip("ik_llama_cpp", reason="llama.cpp isn't installed: pip install ik-llama-cpp-python")
    name, steps, _ = WRITTEN[case]
    model = pruned(name, steps)
    export_gguf(model, tmp_path / "out")
    expected = logits(model)[-1]
    found = last_logits(tmp_path / "out" / FILE, IDS, 99)
    assert (found - expected).abs().max() <= 2e-3 * expected.abs().max(), "values are in float16 there"


def test_matrices_have_the_dtype_of_the_checkpoint(tmp_path):
    model = pruned()
    for parameter in model.parameters():  # the buffers of rotary embeddings stay in float32
        parameter.data = parameter.data.to(torch.bfloat16).float()
    export_gguf(model, tmp_path / "out", dtype=torch.bfloat16)
    types = {len(each.shape): each.tensor_type.name for each in gguf.GGUFReader(tmp_path / "out" / FILE).tensors}
    assert types == {1: "F32", 2: "BF16"}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file=FILE, dtype=torch.float32)
    torch.testing.assert_close(logits(again.eval()), logits(model), rtol=0, atol=1e-4)
    with pytest.raises(VerificationError, match="doesn't hold"):  # what isn't exact in bfloat16
        export_gguf(pruned(), tmp_path / "rounded", dtype=torch.bfloat16)
    assert not (tmp_path / "rounded").exists()


REFUSED = {
    "another family": (lambda: zoo.build("gpt2"), "writes llama, mistral, qwen2; this is a gpt2"),
    "sizes by layer": (lambda: pruned("qwen2", UNEVEN[1:]), "one size for all layers of a qwen2.*uniform: true"),
    "a part": (
        lambda: pruned(steps=[{"target": "layers", "part": "attention", "remove": [1]}]),
        "drop whole layers, not their parts",
    ),
    "biases": (
        lambda: LlamaForCausalLM(LlamaConfig(**zoo.LLAMA, mlp_bias=True)),
        r"llama has no model\.layers\.0\.mlp\.\w+_proj\.bias",
    ),
    "another activation": (
        lambda: LlamaForCausalLM(LlamaConfig(**zoo.LLAMA, hidden_act="gelu")),
        "with hidden_act silu; here they are gelu",
    ),
    "scaled positions": (
        lambda: LlamaForCausalLM(
            LlamaConfig(**zoo.LLAMA, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0})
        ),
        "rotary embeddings default; here they are linear",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_gguf_can_not_say_is_refused_and_nothing_is_written(tmp_path, case):
    build, message = REFUSED[case]
    with pytest.raises(UnsupportedModelError, match=message):
        export_gguf(build(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_said(monkeypatch):
    monkeypatch.setattr(export_of, "find_spec", lambda name: None)
    with pytest.raises(PruneError, match=r"needs gguf, which isn't installed: `pip install 'hf_prune\[export\]'`"):
        require_writable(LlamaConfig(**zoo.LLAMA))


def test_the_command_copies_the_tokenizer_of_the_dense_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    writer = gguf.GGUFWriter("dense.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"w{number}" for number in range(99)])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_add_bos_token(True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    pruned().save_pretrained("small")
    done = CliRunner().invoke(app, ["export", "small", "--format", "gguf"])
    assert done.exit_code == 0, done.output
    assert "written to" in done.output and "architecture llama" in done.output and "it has no tokenizer" in done.output
    done = CliRunner().invoke(
        app, ["export", "small", "--format", "gguf", "--output", "told", "--tokenizer-from", "dense.gguf"]
    )
    assert done.exit_code == 0 and "no tokenizer" not in done.output, done.output
    fields, of = (gguf.GGUFReader(path).fields for path in (f"told/{FILE}", "dense.gguf"))
    copied = {name: field.contents() for name, field in fields.items() if name.startswith("tokenizer.")}
    assert copied == {name: field.contents() for name, field in of.items() if name.startswith("tokenizer.")}
    assert len(copied) == 5
    again = CliRunner().invoke(app, ["export", "small", "--format", "gguf"])
    assert isinstance(again.exception, PruneError) and "isn't empty" in str(again.exception)


def test_the_command_refuses_before_the_weights_are_read(tmp_path):
    zoo.build("bert").save_pretrained(tmp_path / "small")
    (tmp_path / "small" / "model.safetensors").write_bytes(b"not read")
    done = CliRunner().invoke(
        app, ["export", str(tmp_path / "small"), "--format", "gguf", "--output", str(tmp_path / "x")]
    )
    assert isinstance(done.exception, UnsupportedModelError) and "this is a bert" in str(done.exception)
