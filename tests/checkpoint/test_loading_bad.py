"""Checkpoints that are damaged, or asked to be what they aren't: an error that names it, never random weights."""

import json

import pytest
import torch
from transformers import AutoModel, BertForSequenceClassification, LlamaForCausalLM

from hf_prune.errors import CheckpointError
from hf_prune.structure.inputs import example_inputs
from tests.checkpoint.shrunk import assert_close, outputs, shrunk


@pytest.fixture
def saved(tmp_path):
    model, _ = shrunk("bert")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    return model, tmp_path


def edit(path, change):
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def lose(directory):
    sorted(directory.glob("model-*.safetensors"))[1].unlink()


def cut(directory):
    shard = sorted(directory.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])


def point(place):
    def change(directory):
        edit(directory / "model.safetensors.index.json", lambda index: index["weight_map"].update(x=place))

    return change


def age(directory):
    edit(directory / "config.json", lambda config: config["hf_prune"].update(version=10**9))


def rename(directory):
    edit(directory / "config.json", lambda config: config.update(model_type="roberta"))


def swap(directory):
    edit(directory / "config.json", lambda config: config["hf_prune"].update({"class": "T5Model"}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose, "model-00002-of-.*Save or download it again"),
        (cut, "model-00002-of-.* is damaged or cut short"),
        (point("../model.safetensors"), "lacks '../model.safetensors'"),
        (point("/etc/passwd"), "lacks '/etc/passwd'"),
        (age, "upgrade hf_prune"),
        (rename, "is of a BertForSequenceClassification; expected a class of model_type 'roberta'; download"),
        (swap, "is of a T5Model; expected a class of model_type 'bert'"),
    ],
)
@pytest.mark.parametrize("ignore", [False, True])
def test_damage_is_named(damage, message, ignore, saved):
    damage(saved[1])
    with pytest.raises(CheckpointError, match=message):
        AutoModel.from_pretrained(saved[1], ignore_mismatched_sizes=ignore)


def test_another_architecture_is_refused(saved):
    with pytest.raises(CheckpointError, match="expected a class of model_type 'llama'"):
        LlamaForCausalLM.from_pretrained(saved[1], ignore_mismatched_sizes=True)


def test_nothing_is_made_up_where_sizes_may_differ(saved):
    """With `ignore_mismatched_sizes` all is read, and a head for other labels is the only thing that is new."""
    model, directory = saved
    inputs = example_inputs(model)
    loaded = BertForSequenceClassification.from_pretrained(directory, ignore_mismatched_sizes=True)
    assert_close(outputs(model, inputs), outputs(loaded, inputs))
    other = BertForSequenceClassification.from_pretrained(directory, num_labels=5, ignore_mismatched_sizes=True)
    assert other.classifier.out_features == 5
    expected = model.state_dict()
    for name, tensor in other.state_dict().items():
        assert name.startswith("classifier.") or torch.equal(tensor, expected[name]), name
