"""Every way in which people load and go on with a checkpoint, crossed with families: what is computed stays the same."""

import copy
import pickle

import pytest
import torch
from transformers import (
    AutoModel,
    BertForMaskedLM,
    GPT2ForSequenceClassification,
    LlamaForSequenceClassification,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    ViTForImageClassification,
)

import hf_prune
from hf_prune.checkpoint import is_complete
from hf_prune.structure import inspect_model
from hf_prune.structure.inputs import example_inputs
from tests import zoo
from tests.checkpoint.shrunk import assert_close, outputs, shrunk


# layouts that differ in how their sizes are kept: separate, grouped-query, fused transposed, relative biases, patches
FAMILIES = ("bert", "llama", "gpt2", "t5", "vit")
CAUSAL = ("llama", "gpt2")
GENERATES = (*CAUSAL, "t5")


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, tmp_path_factory):
    """(family, the model as it was saved, its directory): sizes differ by layer, and the weights are in shards."""
    model, verdict = shrunk(request.param)
    assert verdict.loads_with == "hf_prune"
    directory = tmp_path_factory.mktemp(request.param) / "model"
    model.save_pretrained(directory, max_shard_size="20KB")
    assert len(list(directory.glob("model-*.safetensors"))) > 1
    return request.param, model, directory


# name -> arguments of from_pretrained
WAYS = {
    "plainly": {},
    "onto a device": {"device_map": "cpu"},
    "onto devices by themselves": {"device_map": "auto"},
    "partly from disk": {"device_map": "auto", "max_memory": {}},
    "eager attention": {"attn_implementation": "eager"},
    "sdpa attention": {"attn_implementation": "sdpa"},
    "remote code allowed": {"trust_remote_code": True},
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("by", ["auto", "class"])
def test_it_computes_the_same(way, by, saved, tmp_path):
    family, model, directory = saved
    options = dict(WAYS[way])
    if "max_memory" in options:
        n_bytes = sum(each.numel() * each.element_size() for each in model.parameters())
        options |= {"max_memory": {"cpu": n_bytes - 1}, "offload_folder": tmp_path / "offload"}
    loader = type(model) if by == "class" else zoo.MODELS[family][2]
    if options.get("attn_implementation") == "sdpa" and not type(model)._supports_sdpa:
        pytest.skip(f"this Transformers has no sdpa attention for a {type(model).__name__}, dense or not")
    loaded = loader.from_pretrained(directory, **options)
    if "max_memory" in options:
        assert any(each.is_meta for each in loaded.parameters()), "nothing was left on disk, so this proves nothing"
    assert_close(outputs(model, example_inputs(model)), outputs(loaded, example_inputs(model)), 1e-5)


def test_in_another_dtype(saved):
    """The weights are those of the checkpoint, rounded; buffers are made by each class in the precision that it wants."""
    _, model, directory = saved
    loaded = type(model).from_pretrained(directory, dtype=torch.bfloat16)
    expected = dict(model.named_parameters())
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, expected[name].to(torch.bfloat16)), name
    wide = copy.deepcopy(model).load_state_dict(loaded.float().state_dict())
    assert not wide.missing_keys and not wide.unexpected_keys


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies_compute_the_same_and_save_the_same(copied, saved, tmp_path):
    _, model, directory = saved
    twin = copied(type(model).from_pretrained(directory))
    twin.save_pretrained(tmp_path / "twin")
    again = type(model).from_pretrained(tmp_path / "twin")
    for each in (twin, again):
        assert_close(outputs(model, example_inputs(model)), outputs(each, example_inputs(model)))


# a task model of each family, other than the one that is saved
TASKS = {
    "bert": BertForMaskedLM,
    "llama": LlamaForSequenceClassification,
    "gpt2": GPT2ForSequenceClassification,
    "t5": T5ForConditionalGeneration,
    "vit": ViTForImageClassification,
}


def test_base_from_task_and_task_from_base(saved, tmp_path):
    """Each by way of the other; and one task from another's checkpoint, whose head it hasn't."""
    family, model, directory = saved
    if family == "vit" and zoo.is_before("5.23"):
        pytest.skip("this Transformers doesn't load a dense ViT's base into its task model either")
    base = AutoModel.from_pretrained(directory)
    assert_close(outputs(model.base_model, example_inputs(model)), outputs(base, example_inputs(model)))
    base.save_pretrained(tmp_path / "base")
    for place in (tmp_path / "base", directory):
        task = TASKS[family].from_pretrained(place)
        if family == "t5":  # a task model that holds the parts of the base, not the base
            ids = {"input_ids": example_inputs(model)["input_ids"]}
            assert_close(outputs(base.get_encoder(), ids), outputs(task.get_encoder(), ids))
            found = task.state_dict()
            assert all(torch.equal(tensor, found[name]) for name, tensor in base.state_dict().items())
        else:
            expected, found = outputs(base, example_inputs(model)), outputs(task.base_model, example_inputs(model))
            expected.pop("pooler_output", None)  # which some task models leave out
            assert_close(expected, {key: found[key] for key in expected})


# name -> options of generate
DECODING = {
    "greedy": {},
    "without a cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "beam search": {"num_beams": 3},
    "beam search, static cache": {"num_beams": 3, "cache_implementation": "static"},
}


@pytest.mark.parametrize("decoding", DECODING)
def test_it_generates_the_same(decoding, saved, tmp_path):
    family, model, directory = saved
    if family not in GENERATES:
        pytest.skip("generates nothing")
    if family == "t5":  # what is saved is the base: here with a head, saved anew
        model, directory = TASKS[family].from_pretrained(directory), tmp_path / "task"
        model.save_pretrained(directory, max_shard_size="20KB")
    loaded = type(model).from_pretrained(directory)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    inputs = example_inputs(model)
    ids = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
    # beams by a cache that grows are the reference of those by one that doesn't
    expected = model.generate(**ids, **options, num_beams=DECODING[decoding].get("num_beams", 1))
    assert torch.equal(loaded.generate(**ids, **options, **DECODING[decoding]), expected)


@pytest.mark.slow
def test_it_compiles(saved):
    _, model, directory = saved
    loaded = torch.compile(type(model).from_pretrained(directory).eval())
    assert_close(outputs(model, example_inputs(model)), outputs(loaded, example_inputs(model)), 1e-5)


def test_it_is_pruned_again(saved, tmp_path):
    """A second pruning starts from the sizes that are there, and its checkpoint holds what is left after both."""
    _, model, directory = saved
    loaded = type(model).from_pretrained(directory)
    before = sum(site.n_units for site in inspect_model(loaded).of("ffn_neurons"))
    step = {"target": "ffn_neurons", "sparsity": 0.3, "criterion": "l1", "scope": "global"}
    hf_prune.prune_(loaded, {"version": 1, "prune": [step]})
    loaded.save_pretrained(tmp_path / "twice")
    again = type(model).from_pretrained(tmp_path / "twice")
    assert sum(site.n_units for site in inspect_model(again).of("ffn_neurons")) == before - round(0.3 * before)
    assert_close(outputs(loaded, example_inputs(model)), outputs(again, example_inputs(model)))


def test_it_trains_on_by_the_stock_trainer(saved, tmp_path):
    family, model, directory = saved
    if family not in (*CAUSAL, "bert"):
        pytest.skip("a base model has no loss")
    loaded = type(model).from_pretrained(directory)
    row = {key: value[0] for key, value in example_inputs(model).items()}
    if "labels" not in row:
        row["labels"] = row["input_ids"].clone() if family in CAUSAL else torch.tensor(1)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=2, save_steps=1, learning_rate=1e-2, report_to="none", use_cpu=True
    )
    trainer = Trainer(loaded, arguments, train_dataset=[row] * 8)
    trainer.train()
    trainer.save_model(str(tmp_path / "trained"))
    for place in (tmp_path / "trained", tmp_path / "run" / "checkpoint-2"):
        assert is_complete(place)
        assert_close(
            outputs(loaded, example_inputs(model)), outputs(type(model).from_pretrained(place), example_inputs(model))
        )
    key = next(iter(outputs(model, example_inputs(model))))
    assert not torch.equal(outputs(model, example_inputs(model))[key], outputs(loaded, example_inputs(model))[key]), (
        "nothing was learnt"
    )


def test_adapters_go_on_top(saved, tmp_path):
    """LoRA (Hu et al. 2022) through PEFT: saved, loaded over the pruned checkpoint, merged, and saved merged."""
    peft = pytest.importorskip("peft")
    family, model, directory = saved
    names = ["c_attn", "c_proj"] if family == "gpt2" else "all-linear"
    config = peft.LoraConfig(target_modules=names, r=2, init_lora_weights=False, fan_in_fan_out=family == "gpt2")
    tuned = peft.get_peft_model(type(model).from_pretrained(directory), config)
    expected = outputs(tuned, example_inputs(model))
    tuned.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(type(model).from_pretrained(directory), tmp_path / "adapter")
    assert_close(expected, outputs(again, example_inputs(model)))
    merged = again.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert_close(expected, outputs(type(model).from_pretrained(tmp_path / "merged"), example_inputs(model)), 1e-5)


def test_it_is_quantised_as_it_loads(saved):
    """What `quantization_config` gives of the checkpoint is what quantising the model in memory gives."""
    torchao = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    family, model, directory = saved
    if family == "gpt2":
        pytest.skip("torchao quantises nn.Linear only, and its layers are Conv1D")
    how = torchao.Int8WeightOnlyConfig()
    loaded = type(model).from_pretrained(directory, quantization_config=TorchAoConfig(how))
    weights = [module.weight for module in loaded.modules() if isinstance(module, torch.nn.Linear)]
    quantised = [weight for weight in weights if type(weight) not in (torch.Tensor, torch.nn.Parameter)]
    assert quantised, "nothing was quantised"
    expected, found = outputs(model, example_inputs(model)), outputs(loaded, example_inputs(model))
    for key, value in expected.items():
        assert (found[key] - value).abs().max() <= 0.05 * value.abs().max()
