"""Whatever sizes a model has after removal, its checkpoint loads again and computes the same."""

import copy
import json
import pickle

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertForSequenceClassification,
    BertModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    pipeline,
)

import hf_prune
from hf_prune.checkpoint import allowed_sizes, is_complete
from hf_prune.errors import CheckpointError
from hf_prune.structure import inspect_model
from hf_prune.structure.inputs import example_inputs
from tests import zoo
from tests.checkpoint.shrunk import assert_close, outputs, shrunk
from tests.processes import python
from tests.reach.zoo import build


@pytest.mark.parametrize("uneven", [False, True], ids=["even", "uneven"])
@pytest.mark.parametrize("name", zoo.MODELS)
def test_round_trip(name, uneven, tmp_path):
    model, _ = shrunk(name, torch.float64, uneven=uneven)
    inputs = example_inputs(model)
    model.save_pretrained(tmp_path / "model")
    for loader in (type(model), zoo.MODELS[name][2]):
        loaded = loader.from_pretrained(tmp_path / "model", dtype=torch.float64)
        assert type(loaded) is type(model)
        assert_close(outputs(model, inputs), outputs(loaded, inputs))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["ffn_neurons", "attention_heads", "layers"])
@pytest.mark.parametrize("name", zoo.MODELS)
def test_round_trip_of_one_target_alone_evenly(name, target, tmp_path):
    """Even sizes go by the stock config where it has a field for them: no trace of hf_prune is left then."""
    if not inspect_model(zoo.build(name)).of(target):
        assert (name, target) == ("bloom", "attention_heads")
        return
    model, verdict = shrunk(name, torch.float64, targets=(target,), uneven=False)
    inputs = example_inputs(model)
    model.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    assert ("hf_prune" in config) == (verdict.loads_with == "hf_prune")
    loaded = zoo.MODELS[name][2].from_pretrained(tmp_path, dtype=torch.float64)
    assert_close(outputs(model, inputs), outputs(loaded, inputs))
    if target == "layers":
        assert verdict.loads_with == "transformers", "every config here has a field for the depth"


@pytest.mark.parametrize(
    ("name", "targets", "edits"),
    [
        ("bert", ("ffn_neurons",), {"intermediate_size": 40}),
        ("llama", ("ffn_neurons",), {"intermediate_size": 40}),
        ("llama", ("attention_heads",), {"num_attention_heads": 2, "head_dim": 8, "num_key_value_heads": 1}),
        ("gpt2", ("ffn_neurons",), {"n_inner": 120}),
        ("t5", ("ffn_neurons",), {"d_ff": 40}),
        ("bart", ("ffn_neurons",), {"encoder_ffn_dim": 40, "decoder_ffn_dim": 32}),
        ("albert", ("layers",), {}),
        ("clip", ("layers",), {"text_config.num_hidden_layers": 2, "vision_config.num_hidden_layers": 2}),
    ],
)
def test_what_the_config_can_say_is_a_stock_checkpoint(name, targets, edits, tmp_path):
    model, verdict = shrunk(name, targets=targets, uneven=False)
    assert verdict.loads_with == "transformers"
    assert verdict.edits == edits
    model.save_pretrained(tmp_path)
    assert "hf_prune" not in (tmp_path / "config.json").read_text()
    assert not list(tmp_path.glob("*.py"))


@pytest.mark.parametrize(("name", "targets"), [("bert", ("attention_heads",)), ("bloom", ("ffn_neurons",))])
def test_what_it_can_not_say_carries_a_manifest_and_the_modelling_file(name, targets, tmp_path):
    model, verdict = shrunk(name, targets=targets)
    assert verdict.loads_with == "hf_prune"
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["hf_prune"]["version"] == 1
    assert (tmp_path / "modeling_hf_prune.py").exists()
    assert is_complete(tmp_path)


@pytest.mark.parametrize("model_type", ["step3p7"])
def test_what_a_config_computes_as_it_is_read_is_no_place_for_a_size(model_type, tmp_path):
    """Its width is what its config makes of `mlp_ratio` each time."""
    built = build(model_type)
    step = {"target": "ffn_neurons", "include": ["*vision*"], "sparsity": 0.5, "criterion": "l2"}
    hf_prune.prune_(built.model, {"version": 1, "prune": [step]}, calibration=[built.inputs])
    assert "model.vision_model.layers.0.mlp.fc1" in built.model.config.hf_prune["modules"]
    expected = outputs(built.model, built.inputs)
    built.model.save_pretrained(tmp_path)
    assert_close(expected, outputs(type(built.model).from_pretrained(tmp_path, dtype=torch.float32), built.inputs))


def test_a_pipeline_loads_it(tmp_path):
    model, verdict = shrunk("bert", targets=("attention_heads",))
    assert verdict.loads_with == "hf_prune"
    model.save_pretrained(tmp_path)
    words = Tokenizer(WordLevel({"[UNK]": 0} | {f"w{number}": number for number in range(1, 99)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[UNK]")
    said = pipeline("text-classification", model=str(tmp_path), tokenizer=tokenizer)("w5 w6 w7", top_k=None)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[5, 6, 7]])).logits.softmax(-1)[0]
    scores = {each["label"]: each["score"] for each in said}
    assert [scores[f"LABEL_{number}"] for number in range(2)] == pytest.approx(expected.tolist(), abs=1e-6)


def test_base_from_head_and_head_from_base(tmp_path):
    model, _ = shrunk("bert")
    inputs = example_inputs(model)
    model.save_pretrained(tmp_path / "head")
    base = AutoModel.from_pretrained(tmp_path / "head")
    assert isinstance(base, BertModel)
    assert_close(outputs(model.bert, inputs), outputs(base, inputs))
    base.save_pretrained(tmp_path / "base")
    again = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    assert_close(outputs(model.bert, inputs), outputs(again.bert, inputs))


def test_sharded_other_dtype_deepcopy_and_pickle(tmp_path):
    model, _ = shrunk("phi3")
    inputs = example_inputs(model)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    loaded = type(model).from_pretrained(tmp_path)
    assert_close(outputs(model, inputs), outputs(loaded, inputs))
    half = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    for twin in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert_close(outputs(model, inputs), outputs(twin, inputs))


def test_generate(tmp_path):
    model, _ = shrunk("llama")
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    ids = example_inputs(model)["input_ids"]
    assert torch.equal(
        model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0),
        loaded.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0),
    )


@pytest.mark.parametrize(
    "targets", [("ffn_neurons", "attention_heads", "layers"), ("layers.attention",)], ids="+".join
)
def test_loads_without_hf_prune(targets, tmp_path):
    """The checkpoint's own modelling file, in a process that can't import this package; without that file not at all."""
    model, _ = shrunk("bert", targets=targets)
    model.save_pretrained(tmp_path / "model")
    inputs = example_inputs(model)
    torch.save((inputs, outputs(model, inputs)), tmp_path / "expected.pt")
    program = f"""
import sys

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_prune":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Hide())
try:
    import hf_prune
except ModuleNotFoundError:
    print("hidden")

import torch
from transformers import AutoModel, AutoModelForSequenceClassification
inputs, expected = torch.load({str(tmp_path / "expected.pt")!r})
model = AutoModelForSequenceClassification.from_pretrained({str(tmp_path / "model")!r}, trust_remote_code=True).eval()
with torch.no_grad():
    assert (model(**inputs).logits - expected["logits"]).abs().max() < 1e-6
model.save_pretrained({str(tmp_path / "again")!r})
AutoModel.from_pretrained({str(tmp_path / "again")!r}, trust_remote_code=True)
try:
    AutoModelForSequenceClassification.from_pretrained({str(tmp_path / "again")!r})
except (RuntimeError, ValueError) as error:
    assert "size mismatch" in str(error) or "mismatched" in str(error) or "trust_remote_code" in str(error), error
else:
    raise AssertionError("weights that have left were made up")
"""
    done = python("-c", program, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "hidden" in done.stdout


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda manifest: manifest.update(version=2), "upgrade hf_prune"),
        (lambda manifest: manifest.update(version="1"), "expected an integer"),
        (lambda manifest: manifest.pop("modules"), "modules is missing"),
        (lambda manifest: manifest["modules"].update(nowhere={"tensors": {"weight": [1]}}), "'nowhere'"),
        (lambda manifest: _first(manifest)["tensors"].update(weight=[10**9, 32]), "more than"),
        (lambda manifest: _first(manifest)["tensors"].update(weight=[-1, 32]), "positive integers"),
        (lambda manifest: _first(manifest)["tensors"].update(weight="all"), "positive integers"),
        (lambda manifest: _first(manifest).update(code="import os"), "tensors, attributes and config only"),
        (lambda manifest: _first(manifest).update(attributes={"forward": 1}), "expected a number"),
    ],
)
def test_a_bad_manifest_is_refused(damage, message, tmp_path):
    model, _ = shrunk("bert")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    damage(config["hf_prune"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        BertForSequenceClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("module", "returns", "message"),
    [
        ("bert.encoder.layer.1.attention.self", "os.system", "absent is 'os.system'; expected what its call gives"),
        (
            "bert.encoder.layer.1.attention.self",
            ["zeros", {}],
            "expected what its call gives, of zeros, hidden_states",
        ),
        ("bert.encoder.layer.1.attention.self", [None, "zeros"], "expected what its call gives"),
        ("bert.encoder.layer.1.attention.self", [], "expected what its call gives"),
        ("bert.encoder.layer.1.attention.self", ["zeros"] * 99, "expected what its call gives"),
        ("bert.encoder.layer.1.attention.self", 1, "expected what its call gives"),
        ("bert.encoder.layer.1.output.dropout", "zeros", "holds no parameter"),
        ("", "zeros", "or is no block, nor part of one"),
    ],
)
def test_a_bad_absence_is_refused(module, returns, message, tmp_path):
    model, _ = shrunk("bert", targets=("layers.attention",))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["hf_prune"]["modules"]["bert.encoder.layer.0.attention.self"] == {"absent": ["zeros", None]}
    config["hf_prune"]["modules"][module] = {"absent": returns}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        BertForSequenceClassification.from_pretrained(tmp_path)
    config["hf_prune"]["modules"][module] = {"absent": "zeros", "tensors": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="or absent alone"):
        BertForSequenceClassification.from_pretrained(tmp_path)


def test_base_from_head_and_head_from_base_without_parts(tmp_path):
    model, verdict = shrunk("llama", targets=("layers.attention", "layers.feed_forward"))
    assert verdict.loads_with == "hf_prune" and "which 2 layers, or parts of them, have left" in verdict.why
    model.save_pretrained(tmp_path / "head", max_shard_size="10KB")
    inputs = example_inputs(model)
    base = AutoModel.from_pretrained(tmp_path / "head")
    assert_close(outputs(model.model, inputs), outputs(base, inputs))
    base.save_pretrained(tmp_path / "base")
    head = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert_close(outputs(base, inputs), outputs(head.model, inputs))
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "head", dtype=torch.bfloat16)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(half)))
    assert_close(outputs(half, inputs), outputs(twin, inputs))
    twin.load_state_dict(half.state_dict())


def _first(manifest):
    return next(entry for entry in manifest["modules"].values() if "tensors" in entry)


def test_a_failed_save_leaves_the_old_checkpoint_whole(tmp_path, monkeypatch):
    model, _ = shrunk("bert")
    target = tmp_path / "model"
    model.save_pretrained(target)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    with torch.no_grad():
        model.classifier.weight.add_(1)

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full_disk)
    with pytest.raises(CheckpointError, match="No space left"):
        model.save_pretrained(target)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "a partial folder was left behind"


def test_allowed_sizes():
    llama = zoo.build("llama")
    structure = inspect_model(llama)
    assert allowed_sizes(llama, structure.of("ffn_neurons")) == list(range(1, 49))
    assert allowed_sizes(llama, structure.of("attention_heads")) == [1, 2]
    bert = zoo.build("bert")
    assert allowed_sizes(bert, inspect_model(bert).of("attention_heads")) == [4]
    bloom = zoo.build("bloom")
    assert allowed_sizes(bloom, inspect_model(bloom).of("ffn_neurons")) == [128]


def test_a_stock_model_is_saved_by_stock_code(tmp_path):
    assert hf_prune.__version__
    model = zoo.build("bert")
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert hasattr(PreTrainedModel.post_init, "_hf_prune")
