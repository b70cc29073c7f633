"""Scores of parts of layers against plain loops: what a part adds is looked at where the test knows it to be."""

import pytest
import torch
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import GraniteConfig, GraniteForCausalLM

from hf_prune.calibration import collect
from hf_prune.criteria import get
from hf_prune.errors import UnsupportedModelError
from hf_prune.structure import inspect_model
from hf_prune.structure.inputs import example_inputs
from tests import zoo


# of each block: what writes the attention's and the feed-forward's share (a norm behind the projection where there is one),
# and where the sum of both and what was there before comes by: a module's input, or its output
PLACES = {
    "llama": ("model.layers", ("self_attn.o_proj", "post_attention_layernorm", "in"), ("mlp.down_proj", "", "out")),
    "gemma2": (
        "model.layers",
        ("post_attention_layernorm", "pre_feedforward_layernorm", "in"),
        ("post_feedforward_layernorm", "", "out"),
    ),
    "olmo2": (
        "model.layers",
        ("post_attention_layernorm", "mlp", "in"),
        ("post_feedforward_layernorm", "", "out"),
    ),
    "bert": (
        "bert.encoder.layer",
        ("attention.output.dense", "attention.output.LayerNorm", "in"),
        ("output.dense", "output.LayerNorm", "in"),
    ),
    "opt": ("model.decoder.layers", ("self_attn.out_proj", "final_layer_norm", "in"), ("fc2", "", "out")),
    "gpt_neox": ("gpt_neox.layers", ("attention.dense", "", "out"), ("mlp.dense_4h_to_h", "", "out")),
    "falcon-old": ("transformer.h", ("self_attention.dense", "", "out"), ("mlp.dense_4h_to_h", "", "out")),
    "bloom": ("transformer.h", ("self_attention.dense", "post_attention_layernorm", "in"), ("mlp.dense_4h_to_h", "", "out")),
    "t5": ("encoder.block", ("layer.0.SelfAttention.o", "layer.0", "out"), ("layer.1.DenseReluDense.wo", "", "out")),
    "vit": ("layers", ("attention.o_proj", "layernorm_after", "in"), ("mlp.fc2", "", "out")),
}  # fmt: skip
PARTS = ("attention", "feed_forward")
STEP = 3e-3  # of a difference; norms compute in float32, so that a smaller one would see their rounding


def batches_of(model, name):
    found = []
    for seed in range(2):
        inputs = example_inputs(model, batch_size=3, length=9, seed=seed)
        if name == "bert":
            inputs["attention_mask"][1, 5:] = 0
            inputs["labels"] = torch.tensor([0, 1, 1])
        elif "input_ids" in inputs and name != "t5":
            inputs["labels"] = inputs["input_ids"]
        found.append(inputs)
    return found


def site_of(model, part):
    return inspect_model(model).of("layers", part)[0]


def module(model, *names):
    return model.get_submodule(".".join(name for name in names if name))


def first(value):
    return value if isinstance(value, torch.Tensor) else value[0]


def loss_sum(model, inputs):
    """In float64, where Transformers' own takes float32."""
    logits, labels = model(**inputs).logits, inputs["labels"]
    if labels.dim() == 2:
        logits, labels = logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1)
    return cross_entropy(logits, labels, reduction="sum").item()


def n_labels_of(inputs):
    return inputs["labels"].numel() if inputs["labels"].dim() == 1 else inputs["labels"][:, 1:].numel()


def seen_in(model, name, part, number, batches):
    """By batch: what the part adds, and the sum, (n_tokens, d_model) without padding."""
    stack, *places = PLACES[name]
    adds, at, side = places[PARTS.index(part)]
    rows = []
    with torch.no_grad():
        for inputs in batches:
            caught = {}

            def note(key, caught=caught):
                return lambda module, args, kwargs, output=None: caught.update(
                    {key: first(output if output is not None else args or kwargs["hidden_states"]).clone()}
                )

            end, total = module(model, stack, str(number), adds), module(model, stack, str(number), at)
            handles = [end.register_forward_hook(note("added"), with_kwargs=True)]
            register = total.register_forward_pre_hook if side == "in" else total.register_forward_hook
            handles.append(register(note("sum"), with_kwargs=True))
            model(**inputs)
            for handle in handles:
                handle.remove()
            kept = inputs["attention_mask"].bool().reshape(-1) if "attention_mask" in inputs else slice(None)
            rows.append([caught[key].reshape(-1, caught[key].shape[-1])[kept] for key in ("added", "sum")])
    return [torch.cat(each) for each in zip(*rows, strict=True)]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", PLACES)
def test_turns_and_updates_are_those_of_the_residual_stream(name, part):
    model = zoo.build(name, torch.float64)
    batches, site = batches_of(model, name), site_of(model, part)
    needs = get("block_influence").needs("layers") | get("activation").needs("layers")
    statistics = collect(model, batches, needs, [site])
    influence, activation = (get(n).score_units(model, site, statistics) for n in ("block_influence", "activation"))
    for unit, number in enumerate(site.numbers):
        added, total = seen_in(model, name, part, number, batches)
        turn = (1 - cosine_similarity(total - added, total, dim=-1)).mean()
        assert influence[unit].item() == pytest.approx(turn.item(), rel=1e-5)
        assert activation[unit].item() == pytest.approx(added.square().mean().sqrt().item(), rel=1e-5)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", ["llama", "gemma2", "bert", "gpt_neox", "falcon-old"])
def test_gates_are_the_parts_own(name, part):
    """dL/dg by differences, sample by sample; under a post-norm the gate is on the norm's output."""
    model = zoo.build(name, torch.float64)
    batches, site = batches_of(model, name), site_of(model, part)
    needs = get("taylor").needs("layers") | get("fisher").needs("layers")
    statistics = collect(model, batches, needs, [site])
    stack, *places = PLACES[name]
    n_labels = sum(n_labels_of(inputs) for inputs in batches)

    def loss(inputs, number, gate):
        end = module(model, stack, str(number), places[PARTS.index(part)][0])
        handle = end.register_forward_hook(lambda module, args, output: output * gate)
        with torch.no_grad():
            found = loss_sum(model, inputs)
        handle.remove()
        return found

    for unit, number in enumerate(site.numbers):
        by_sample = []
        for inputs in batches:
            for row in range(3):
                one = {key: value[row : row + 1] for key, value in inputs.items()}
                by_sample.append((loss(one, number, 1 + STEP) - loss(one, number, 1 - STEP)) / (2 * STEP))
        gates = torch.tensor(by_sample, dtype=torch.float64)
        taylor, fisher = (get(n).score_units(model, site, statistics)[unit].item() for n in ("taylor", "fisher"))
        assert taylor == pytest.approx((gates.abs().sum() / n_labels).item(), rel=2e-3)
        assert fisher == pytest.approx((gates.square().sum() / n_labels).item(), rel=2e-3)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", ["llama", "gemma2", "bert", "gpt_neox"])
def test_loss_change_is_the_loss_without_the_part(name, part):
    model = zoo.build(name, torch.float64)
    batches, site = batches_of(model, name), site_of(model, part)

    def loss(*numbers):
        handles = []
        for number in numbers:
            adds = PLACES[name][1 + PARTS.index(part)][0]
            end = module(model, PLACES[name][0], str(number), adds)
            handles.append(end.register_forward_hook(lambda module, args, output: output * 0))
        with torch.no_grad():
            total = sum(loss_sum(model, inputs) for inputs in batches)
        for handle in handles:
            handle.remove()
        return total / sum(n_labels_of(inputs) for inputs in batches)

    there = {site.key: torch.ones(site.n_units, dtype=torch.bool)}
    scores = get("loss_change", {"greedy": False}).rank_units(model, [site], batches, {site.key: 1}, there, 0)[
        site.key
    ]
    changes = [loss(number) - loss() for number in site.numbers]
    assert scores.tolist() == pytest.approx(changes, rel=1e-3, abs=1e-6)
    greedy = get("loss_change").rank_units(model, [site], batches, {site.key: 2}, there, 0)[site.key]
    one = min(site.numbers, key=lambda number: changes[site.numbers.index(number)])
    two = min((number for number in site.numbers if number != one), key=lambda number: loss(one, number))
    assert [site.numbers[unit] for unit in greedy.argsort()[:2].tolist()] == [one, two]


@pytest.mark.parametrize("part", PARTS)
def test_weights_are_all_that_leave(part):
    model = zoo.build("opt", torch.float64)
    site = site_of(model, part)
    held = "self_attn." if part == "attention" else "fc"
    for unit in range(3):
        inside = model.model.decoder.layers[unit].named_parameters()
        values = torch.cat([tensor.detach().reshape(-1) for name, tensor in inside if name.startswith(held)])
        assert get("l1").score_units(model, site, None)[unit].item() == pytest.approx(values.abs().mean().item())
        expected = values.square().mean().sqrt().item()
        assert get("l2").score_units(model, site, None)[unit].item() == pytest.approx(expected)


def test_attention_and_feed_forward_draw_their_own_random_scores():
    model = zoo.build("llama")
    scores = [get("random").score_units(model, site_of(model, part), None) for part in PARTS]
    assert not torch.equal(*scores)


def test_a_share_that_is_scaled_on_its_way_is_refused():
    """Granite multiplies what a part adds by a number; to look at it before that would be another score."""
    config = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=99)
    torch.manual_seed(0)
    model = GraniteForCausalLM(GraniteConfig(**config, residual_multiplier=0.5)).double().eval()
    batches = [example_inputs(model)]
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.0\.self_attn adds .* can't be told"):
        collect(model, batches, get("block_influence").needs("layers"), [site_of(model, "attention")])
