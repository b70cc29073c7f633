"""Resuming, and loading the best model, where the names of weights on disk are not those in memory."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, ViTConfig

from hf_prune.checkpoint.renamed import load_renamed_
from tests import zoo
from tests.training.data import trainer


def vit(seed):
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=8, patch_size=4
    )
    return AutoModelForImageClassification.from_config(config)


def weights_equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_vit_has_other_names_on_disk_and_is_loaded(tmp_path):
    saved, other = vit(0), vit(1)
    saved.save_pretrained(tmp_path)
    assert not load_file(tmp_path / "model.safetensors").keys() <= saved.state_dict().keys()
    assert load_renamed_(other, tmp_path)
    assert weights_equal(other, saved)


def test_what_has_the_same_names_is_left_alone(tmp_path):
    model = zoo.build("bert")
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        model.classifier.bias += 1
    assert not load_renamed_(model, tmp_path)
    assert (model.classifier.bias >= 0.5).all()


@pytest.mark.parametrize("sharded", [False, True])
def test_a_pruning_trainer_resumes_and_takes_the_best(tmp_path, sharded):
    saved = vit(0)
    saved.save_pretrained(tmp_path / "saved", max_shard_size="20KB" if sharded else "1GB")
    run = trainer(tmp_path / "run", model=vit(1))
    run._load_from_checkpoint(str(tmp_path / "saved"))
    assert weights_equal(run.model, saved)
    run = trainer(tmp_path / "run", model=vit(2))
    run.state.best_model_checkpoint = str(tmp_path / "saved")
    run._load_best_model()
    assert weights_equal(run.model, saved)
