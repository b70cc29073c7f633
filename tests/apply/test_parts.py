"""Dropped parts of layers: the residual stream passes them unchanged, caches count on, what can't be exact is refused."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForSeq2SeqLM

import hf_prune
from hf_prune.apply.masks import masks_of, set_masks
from hf_prune.plan import KeepMasks
from hf_prune.structure import inspect_model
from hf_prune.structure.inputs import example_inputs
from tests import zoo
from tests.apply.test_variants import of_class
from tests.checkpoint.shrunk import assert_close, outputs
from tests.reach.zoo import build as build_type


# what writes a block's attention and feed-forward, by hand
OUTPUTS = {
    "llama": ("model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj"),
    "gemma3": ("model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj"),
    "olmo2": ("model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj"),
    "gpt2": ("transformer.h.1.attn.c_proj", "transformer.h.1.mlp.c_proj"),
    "opt": ("model.decoder.layers.1.self_attn.out_proj", "model.decoder.layers.1.fc2"),
    "gpt_neox": ("gpt_neox.layers.1.attention.dense", "gpt_neox.layers.1.mlp.dense_4h_to_h"),
    "bloom": ("transformer.h.1.self_attention.dense", "transformer.h.1.mlp.dense_4h_to_h"),
    "falcon-old": ("transformer.h.1.self_attention.dense", "transformer.h.1.mlp.dense_4h_to_h"),
    "falcon-new": ("transformer.h.1.self_attention.dense", "transformer.h.1.mlp.dense_4h_to_h"),
    "bert": ("bert.encoder.layer.1.attention.output.dense", "bert.encoder.layer.1.output.dense"),
    "distilbert": ("distilbert.transformer.layer.1.attention.out_lin", "distilbert.transformer.layer.1.ffn.lin2"),
    "deberta-v2": ("deberta.encoder.layer.1.attention.output.dense", "deberta.encoder.layer.1.output.dense"),
    "t5": ("encoder.block.1.layer.0.SelfAttention.o", "encoder.block.1.layer.1.DenseReluDense.wo"),
    "bart": ("encoder.layers.1.self_attn.out_proj", "encoder.layers.1.fc2"),
    "vit": ("layers.1.attention.o_proj", "layers.1.mlp.fc2"),
}
PARTS = ("attention", "feed_forward")


def recipe(*steps, **more):
    return {"version": 1, "prune": [{"target": "layers", **step} for step in steps], **more}


def stack_of(model, part="block"):
    return inspect_model(model).of("layers", part)[0].name


def drop_(model, part, *numbers, **options):
    remove = {stack_of(model, part): list(numbers)}
    return hf_prune.prune_(model, recipe({"part": part, "remove": remove}), **options)


def silenced(model, *names):
    """A copy in which linear layers write zeros."""
    model = copy.deepcopy(model)
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda module, args, output: output * 0)
    return model


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", OUTPUTS)
def test_what_is_left_is_the_model_in_which_the_part_writes_zeros(name, part, tmp_path):
    changes = {"num_hidden_layers": 4, "layer_types": ["sliding_attention"] * 4} if name == "gemma3" else {}
    model = zoo.build(name, torch.float64, **changes)
    inputs = example_inputs(model)
    expected = outputs(silenced(model, OUTPUTS[name][PARTS.index(part)]), inputs)
    before = sum(parameter.numel() for parameter in model.parameters())
    report = drop_(model, part, 1).to_dict()
    assert_close(expected, outputs(model, inputs))
    assert {
        (site["target"], *site["removed"]) for site in report["sites"] if "." in site["target"] and site["removed"]
    } == {(f"layers.{part}", 1)}
    assert report["totals"]["pruned"]["parameters"] == sum(p.numel() for p in model.parameters()) < before
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.config.hf_prune["version"] == 1
    assert_close(expected, outputs(loaded, inputs))
    assert not masks_of(loaded)


def test_of_post_norm_blocks_the_norm_stays():
    model = zoo.build("bert")
    drop_(model, "attention", 1)
    left = {name for name, _ in model.bert.encoder.layer[1].named_parameters() if name.startswith("attention")}
    assert left == {"attention.output.LayerNorm.weight", "attention.output.LayerNorm.bias"}


def test_cross_attention_stays():
    model = zoo.build("bart")
    hf_prune.prune_(model, recipe({"part": "attention", "remove": {"decoder.layers": [0]}}))
    assert not list(model.decoder.layers[0].self_attn.parameters())
    assert len(list(model.decoder.layers[0].encoder_attn.parameters())) == 8


# ----------------------------------------------------------------------------------------------------------------------
# caches


def generated(model, inputs, use_cache, **options):
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
    return model.generate(**inputs, use_cache=use_cache, **options)


@pytest.mark.parametrize("numbers", [(0,), (1, 2), (0, 2)], ids=str)
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {}),
        ("gpt2", {}),
        ("opt", {}),
        ("gpt_neox", {}),
        ("bloom", {}),
        ("falcon-new", {}),
        ("phi3", {}),
        ("mistral", {"sliding_window": 4}),
        ("gemma2", {"sliding_window": 4, "num_hidden_layers": 5}),
        ("gemma3", {"sliding_window": 4, "num_hidden_layers": 5, "layer_types": ["sliding_attention"] * 3 + ["full_attention"] * 2}),
    ],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_generation_with_a_cache_is_that_without(name, changes, numbers, tmp_path):
    model = zoo.build(name, torch.float64, **changes)
    inputs = example_inputs(model, length=9)
    masked = copy.deepcopy(model)
    site = inspect_model(model).of("layers", "attention")[0]
    keep = torch.ones(site.n_units, dtype=torch.bool)
    keep[list(numbers)] = False
    set_masks(masked, KeepMasks({site.key: keep}))
    expected = generated(masked, inputs, use_cache=False)
    drop_(model, "attention", *numbers)
    assert torch.equal(generated(model, inputs, use_cache=True), expected)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(generated(loaded, inputs, use_cache=True), expected)
    assert torch.equal(generated(masked, inputs, use_cache=True), expected), (
        "masked, its attention still fills the cache"
    )


def test_a_static_cache_too():
    model = zoo.build("llama", torch.float64)
    inputs = example_inputs(model, length=9)
    drop_(model, "attention", 0)
    expected = generated(model, inputs, use_cache=False)
    assert torch.equal(generated(model, inputs, use_cache=True, cache_implementation="static"), expected)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_the_cache_of_a_decoder_with_cross_attention(name):
    layers = {"num_layers": 4, "num_decoder_layers": 4} if name == "t5" else {"decoder_layers": 4}
    model = of_class(name, AutoModelForSeq2SeqLM, layers)
    inputs = {key: value for key, value in example_inputs(model).items() if key != "decoder_input_ids"}
    stack = inspect_model(model).of("layers", "attention")[1].name
    hf_prune.prune_(model, recipe({"part": "attention", "remove": {stack: [1, 2]}}))
    assert torch.equal(generated(model, inputs, use_cache=True), generated(model, inputs, use_cache=False))


def test_each_attention_takes_a_place_of_its_own_kind():
    kinds = ["sliding_attention", "full_attention"] * 3
    model = zoo.build("gemma2", num_hidden_layers=6, layer_types=kinds)
    drop_(model, "attention", 0, 3)
    places = {n: layer.self_attn.layer_idx for n, layer in enumerate(model.model.layers) if n not in (0, 3)}
    assert places == {2: 0, 4: 2, 1: 1, 5: 3}
    # a block goes as well: the attentions of blocks 1, 2, 4 are left of kinds full, sliding, sliding
    hf_prune.prune_(model, recipe({"remove": [5]}))
    assert {n: model.model.layers[n].self_attn.layer_idx for n in (1, 2, 4)} == {1: 1, 2: 0, 4: 2}


# ----------------------------------------------------------------------------------------------------------------------
# together with what else leaves


def test_pruned_again_and_again(tmp_path):
    """Attention of block 2 of 5, then block 1, then a feed-forward and heads: each time saved and loaded."""
    model = zoo.build("llama", torch.float64, num_hidden_layers=5)
    inputs = example_inputs(model)
    oracle = silenced(model, "model.layers.2.self_attn.o_proj")
    drop_(model, "attention", 2)
    assert inspect_model(model).of("layers", "attention")[0].numbers == (0, 1, 3, 4)
    assert_close(outputs(oracle, inputs), outputs(model, inputs))

    def reload(step):
        model.save_pretrained(tmp_path / str(step))
        return type(model).from_pretrained(tmp_path / str(step), dtype=torch.float64)

    model = reload(1)
    hf_prune.prune_(model, recipe({"remove": [1]}))
    del oracle.model.layers[1]
    assert_close(outputs(oracle, inputs), outputs(model, inputs))
    assert [model.model.layers[n].self_attn.layer_idx for n in (0, 2, 3)] == [0, 1, 2]
    model = reload(2)
    with pytest.raises(hf_prune.RecipeError, match=r"remove names \[1\] of model.layers, which has units 0, 2, 3"):
        drop_(model, "attention", 1)
    report = hf_prune.prune_(
        model,
        {
            "version": 1,
            "prune": [
                {"target": "layers", "part": "feed_forward", "remove": [1]},
                {"target": "attention_heads", "sparsity": 0.5},
                {"target": "ffn_neurons", "sparsity": 0.5},
            ],
        },
    ).to_dict()
    assert len([site for site in report["sites"] if site["target"] == "attention_heads"]) == 3
    expected = outputs(model, inputs)
    model = reload(3)
    assert_close(expected, outputs(model, inputs))
    ids = {"input_ids": inputs["input_ids"]}
    assert torch.equal(generated(model, ids, use_cache=True), generated(model, ids, use_cache=False))


def test_blocks_parts_heads_neurons_and_weights_in_one_recipe(tmp_path):
    model = zoo.build("llama", torch.float64, num_hidden_layers=6)
    inputs = example_inputs(model)
    report = hf_prune.prune_(
        model,
        {
            "version": 1,
            "prune": [
                {"target": "layers", "remove": [1]},
                {"target": "layers", "part": "attention", "sparsity": 0.4, "criterion": "random"},
                {"target": "layers", "part": "feed_forward", "sparsity": 0.4, "criterion": "random"},
                {"target": "attention_heads", "sparsity": 0.5},
                {"target": "ffn_neurons", "sparsity": 0.25},
                {"target": "weights", "sparsity": 0.5},
            ],
        },
    ).to_dict()
    found = report["sparsity"]
    assert found["layers"] == pytest.approx(1 / 6)
    assert found["layers.attention"] == found["layers.feed_forward"] == pytest.approx(2 / 5)  # of the five blocks left
    assert found["attention_heads"] == pytest.approx(0.5) and found["ffn_neurons"] == pytest.approx(0.25)
    assert found["weights"] == pytest.approx(0.5, abs=1e-3)
    gone = {site["target"]: site["removed"] for site in report["sites"] if site["target"].startswith("layers")}
    assert 1 in gone["layers.attention"] and len(gone["layers.attention"]) == 3, "what leaves with its block is told"
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    assert_close(outputs(model, inputs), outputs(loaded, inputs))


def test_equal_widths_are_still_found_once_a_part_left():
    model = zoo.build("llama")
    step = {"target": "ffn_neurons", "sparsity": 0.5, "uniform": True}
    hf_prune.prune_(
        model, {"version": 1, "prune": [{"target": "layers", "part": "feed_forward", "remove": [1]}, step]}
    )
    assert model.config.intermediate_size == 24, "what the config can say it says"
    assert [model.model.layers[n].mlp.up_proj.out_features for n in (0, 2)] == [24, 24]
    hf_prune.prune_(model, {"version": 1, "prune": [step]})
    assert [model.model.layers[n].mlp.up_proj.out_features for n in (0, 2)] == [12, 12]


@pytest.mark.parametrize("what", ["parameters", "macs"])
@pytest.mark.parametrize("part", PARTS)
def test_budgets_are_met_within_half_a_part(part, what):
    model = zoo.build("llama", num_hidden_layers=8)
    dense = copy.deepcopy(model)
    totals = hf_prune.prune_(
        model, recipe({"part": part, "sparsity": {what: 0.2}}, calibration={"length": 16})
    ).to_dict()["totals"]
    one = drop_(dense, part, 0).to_dict()["totals"]
    price = one["dense"][what] - one["pruned"][what]
    assert abs(totals["dense"][what] * 0.8 - totals["pruned"][what]) <= price / 2


# ----------------------------------------------------------------------------------------------------------------------
# training


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", ["llama", "bert", "falcon-old", "bloom"])
def test_masked_parts_stay_out_in_training_and_the_small_model_trains_on(name, part):
    model = zoo.build(name).train()
    inputs = {**example_inputs(model), "labels": torch.tensor([0, 1])}
    inputs["labels"] = inputs["labels"] if name == "bert" else inputs["input_ids"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    steps = recipe(
        {"part": part, "sparsity": 0.67, "criterion": "taylor"},
        schedule={"name": "linear", "begin": 0.2, "end": 0.6, "updates": 2},
    )
    pruner = hf_prune.Pruner(model, optimizer, steps, n_steps=10, calibration=[inputs])
    (site,) = inspect_model(model).of("layers", part)
    sparsity = []
    for _ in range(10):
        model(**inputs).loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters()), "another process would wait for it"
        keep = masks_of(model).units.get(site.key, torch.ones(3, dtype=torch.bool))
        for unit in torch.nonzero(~keep).reshape(-1).tolist():
            for held in site.branches[unit].parameters:
                assert not model.get_parameter(held).grad.any() and not model.get_parameter(held).any()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
        sparsity.append(pruner.sparsity()[f"layers.{part}"])
    assert sorted(sparsity) == sparsity and sparsity[0] == 0 and sparsity[-1] == pytest.approx(2 / 3)
    report = pruner.finish().to_dict()
    assert report["verification"]["max_difference"] <= 1e-4
    model(**inputs).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    model = zoo.build("llama", dtype)
    steps = recipe({"part": "attention", "remove": [0]}, {"part": "feed_forward", "remove": [1]})
    assert hf_prune.prune_(model, steps).to_dict()["verification"]["site_difference"] <= 1e-5
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_a_fault_beside_the_part_is_caught_in_its_block(monkeypatch):
    from hf_prune.apply import shrink

    removed = shrink.remove_masked_

    def wrong(model, *args, **kwargs):
        record = removed(model, *args, **kwargs)
        model.model.layers[1].post_attention_layernorm.weight.data.mul_(1.02)
        return record

    monkeypatch.setattr("hf_prune.pipeline.remove_masked_", wrong)
    model = zoo.build("llama", torch.bfloat16)
    with pytest.raises(hf_prune.VerificationError, match=r"model\.layers\.1 computes something else"):
        drop_(model, "attention", 1)


# ----------------------------------------------------------------------------------------------------------------------
# refusals


def unchanged(model, run, error, message):
    before, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    modules = dict(model.named_modules())
    with pytest.raises(error, match=message):
        run(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.config.to_dict() == config and not masks_of(model)
    assert all(modules[name] is module for name, module in model.named_modules())


@pytest.mark.parametrize(
    ("name", "changes", "step", "error", "message"),
    [
        ("albert", {}, {"part": "attention", "sparsity": 0.4}, hf_prune.UnsupportedModelError, "called 3 times"),
        ("albert", {}, {"part": "feed_forward", "sparsity": 0.4}, hf_prune.UnsupportedModelError, "called 3 times"),
        (
            "gpt2",
            {"scale_attn_by_inverse_layer_idx": True},
            {"part": "attention", "sparsity": 0.4},
            hf_prune.UnsupportedModelError,
            "scale_attn_by_inverse_layer_idx",
        ),
        (
            "gemma2",
            {},
            {"part": "attention", "remove": [1]},
            hf_prune.PruneError,
            "no full_attention is left in its 3 blocks",
        ),
        (
            "t5",
            {},
            {"part": "attention", "remove": {"encoder.block": [0]}},
            hf_prune.RecipeError,
            r"remove names \[0\] of encoder.block, which has units 1 to 2",
        ),
        (
            "llama",
            {},
            {"part": "feed_forward", "remove": [3]},
            hf_prune.RecipeError,
            r"remove names \[3\] of model.layers, which has units 0 to 2",
        ),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_refused_says_why_and_changes_nothing(name, changes, step, error, message):
    model = zoo.build(name, **changes)
    unchanged(model, lambda m: hf_prune.prune_(m, recipe(step)), error, message)


def test_why_the_first_attention_of_t5_stays_is_told():
    refusals = [r for r in inspect_model(zoo.build("t5")).refusals if r.kind == "layers.attention"]
    assert [r.name for r in refusals] == ["encoder.block.0", "decoder.block.0"]
    assert all("relative_attention_bias serves all blocks" in r.reason for r in refusals)
    assert "refused: layers.attention of encoder.block.*" in str(inspect_model(zoo.build("t5")))


def test_the_block_that_inherits_a_position_bias_keeps_its_attention():
    steps = recipe({"part": "attention", "remove": {"encoder.block": [1]}}, {"remove": {"encoder.block": [0]}})
    message = "block 1 would inherit the position bias of block 0"
    unchanged(zoo.build("t5"), lambda m: hf_prune.prune_(m, steps), hf_prune.PruneError, message)
    model = zoo.build("t5")  # in two prunings as well
    hf_prune.prune_(model, recipe({"part": "attention", "remove": {"encoder.block": [1]}}))
    unchanged(model, lambda m: hf_prune.prune_(m, recipe({"remove": {"encoder.block": [0]}})), hf_prune.PruneError, message)  # fmt: skip
    hf_prune.prune_(model, recipe({"remove": {"encoder.block": [1]}}))
    assert len(model.encoder.block) == 2


class _WithResidual(nn.Module):
    """A feed-forward that adds its input to what it writes, doubled."""

    def __init__(self, mlp):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x):
        return self.down_proj(self.gate_proj(x).relu() * self.up_proj(x)) + 2 * x


def test_a_module_that_does_more_than_its_part_is_caught():
    model = zoo.build("llama")
    model.model.layers[1].mlp = _WithResidual(model.model.layers[1].mlp)
    unchanged(model, lambda m: drop_(m, "feed_forward", 1), hf_prune.VerificationError, "returns something of its own")
    drop_(model, "feed_forward", 2)


def test_two_feed_forwards_in_a_block_leave_together():
    model = zoo.build("llama")
    model.model.layers[0].shared_mlp = copy.deepcopy(model.model.layers[0].mlp)
    (site,) = inspect_model(model).of("layers", "feed_forward")
    assert site.numbers == (0, 1, 2)
    assert set(site.branches[0].modules) == {"model.layers.0.mlp", "model.layers.0.shared_mlp"}
    assert site.branches[0].outputs == ("model.layers.0.mlp.down_proj", "model.layers.0.shared_mlp.down_proj")


def test_a_feed_forward_beside_experts_is_refused():
    model = zoo.build("llama")
    for layer in model.model.layers:
        layer.mlp.shared = copy.deepcopy(layer.mlp)
        layer.mlp.experts = nn.ParameterList([nn.Parameter(torch.zeros(2, 4, 4))])
        del layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj
    structure = inspect_model(model)
    assert not structure.of("layers", "feed_forward")
    assert "also holds model.layers.0.mlp.experts.0, which would stay" in structure.refusals[0].reason


def test_blocks_of_linear_attention_alone_are_refused_where_the_model_counts_by_a_cache():
    model = build_type("qwen3_next").model
    (site,), (attentions,) = inspect_model(model).of("layers"), inspect_model(model).of("layers", "attention")
    keep = torch.tensor([number not in attentions.numbers for number in range(site.n_units)])
    assert 0 < keep.sum() < len(keep)
    with pytest.raises(hf_prune.PruneError, match=r"no attention is left in its \d blocks"):
        set_masks(model, KeepMasks(units={site.key: keep}))
