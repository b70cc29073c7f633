"""Blocks learn what the dense model's put out: the step that is promised, nearer than a refit alone, and masks stay."""

import copy

import pytest
import torch

from hf_prune import make_plan, prune_
from hf_prune.calibration.blocks import first_tensor
from hf_prune.errors import CalibrationError, RecipeError
from hf_prune.planning.reconstruct import learning_parameters
from hf_prune.recipe import Recipe
from hf_prune.structure import inspect_model, stacks_of
from tests import zoo
from tests.planning.test_repair import batches_of, distances, masked, outputs, recipe, repaired, step


GONE = [0, 1, 2, 3, 4, 5, 6, 7]
WEIGHTS = {"target": "weights", "sparsity": 0.5, "criterion": "l1"}
NEURONS = {"target": "ffn_neurons", "remove": {"model.layers.*": GONE}}
RATE = 1e-4


def reconstruct(**options):
    return {"name": "reconstruct", **options}


def hidden_states(model, batch):
    """Into the first block and out of each, (n_blocks + 1) times (B, T, d_model)."""
    with torch.no_grad():
        return model(**batch, output_hidden_states=True).hidden_states


def block_outputs(model, name, batches):
    """Of each block of the stack that a module is in, (n_tokens, d_model), without padding."""
    (blocks,) = (blocks for stack, blocks in stacks_of(model).items() if f"{name}.".startswith(f"{stack}."))
    masks = [batch.get("attention_mask") for batch in batches]
    found = []
    for block in blocks:
        seen = []
        handle = model.get_submodule(block).register_forward_hook(
            lambda module, args, output, seen=seen: seen.append(first_tensor(output))
        )
        outputs(model, batches)
        handle.remove()
        rows = (
            output[mask != 0] if mask is not None and mask.shape == output.shape[:-1] else output.flatten(0, -2)
            for output, mask in zip(seen, masks, strict=True)
        )
        found.append(torch.cat(list(rows)))
    return found


def relative_errors(model, other, name, batches):
    """Of what each block puts out, beside the dense model's."""
    pairs = zip(*(block_outputs(each, name, batches) for each in (other, model)), strict=True)
    return [((found - dense).square().sum(1) / dense.square().sum(1)).mean().item() for found, dense in pairs]


def test_a_step_is_adams_on_the_relative_error_of_the_block():
    model = zoo.build("llama", torch.float64)
    (batch,) = batches_of(model, 1)
    neurons = {**NEURONS, "remove": {"model.layers.0.*": GONE}}
    refitted = make_plan(model, recipe({**neurons, "compensation": "least_squares"}), calibration=[batch])
    learned = make_plan(
        model, recipe({**neurons, "compensation": reconstruct(epochs=1, learning_rate=RATE)}), calibration=[batch]
    )
    block = repaired(model, refitted).model.layers[0]
    into, wanted = hidden_states(model, batch)[:2]
    positions = model.model.rotary_emb(into, torch.arange(into.shape[1])[None])
    for parameter in block.parameters():
        parameter.requires_grad_()
    put_out = block(into, position_embeddings=positions)
    error = ((put_out - wanted).norm(dim=-1) / wanted.norm(dim=-1)).pow(2)[batch["attention_mask"] != 0].mean()
    error.backward()
    gone = torch.tensor(GONE)
    learning = {name: parameter for name, parameter in block.named_parameters() if name.startswith("mlp.")}
    of_block = {name for name in learned.replacements if name.startswith("model.layers.0.")}
    assert of_block == {f"model.layers.0.{name}" for name in learning}
    for name, parameter in learning.items():
        # the first step of Adam is as long as the rate in every entry that has a gradient, whatever its size
        expected = parameter.detach() - RATE * parameter.detach().square().mean().sqrt() * parameter.grad.sign()
        found = learned.replacements[f"model.layers.0.{name}"]
        clear = parameter.grad.abs() > 1e-6
        assert clear.float().mean() > 0.4, name
        torch.testing.assert_close(found[clear], expected[clear], rtol=0, atol=1e-5 * RATE)
        if name == "mlp.down_proj.weight":
            assert not found[:, gone].any()
        else:
            assert not found[gone].any()


@pytest.mark.parametrize("target", ["ffn_neurons", "attention_heads", "layers"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "vit", "bert", "mixtral"])
def test_it_comes_nearer_than_the_refit_alone(name, target):
    model = zoo.build(name)
    batches = batches_of(model, 10)
    (site, *_) = inspect_model(model).of(target)
    removed = {"remove": {site.name: [1]}} if target == "layers" else {"sparsity": 0.5}
    # nothing linear makes up for what stacked experts lost, nor for layers behind a block that ends in a norm or in experts
    refit = "none" if (name, target) in {("bert", "layers"), ("mixtral", "layers")} else "least_squares"
    steps = (
        step(target, compensation, **removed) for compensation in (refit, reconstruct(epochs=4, learning_rate=0.003))
    )
    plans = [make_plan(model, recipe(each), calibration=batches) for each in steps]
    near = [relative_errors(model, repaired(model, plan), site.name, batches)[-1] for plan in plans]
    assert near[1] < near[0]
    assert plans[0].masks == plans[1].masks
    (note,) = (note for note in plans[1].notes if "blocks learned what the dense model's put out" in note)
    assert "relative squared error" in note


@pytest.mark.parametrize(
    "steps",
    [
        [WEIGHTS, {**NEURONS, "compensation": "reconstruct"}],
        [{**WEIGHTS, "compensation": "reconstruct"}],
        [{**WEIGHTS, "criterion": "sparsegpt", "compensation": "reconstruct"}],
        [{"target": "weights", "pattern": "2:4", "criterion": "wanda", "compensation": "reconstruct"}],
    ],
    ids=["before neurons", "l1", "sparsegpt", "2:4"],
)
def test_single_weights_that_left_stay_out(steps):
    model = zoo.build("llama")
    batches = batches_of(model)
    plan = make_plan(model, recipe(*steps), calibration=batches)
    bare = make_plan(model, recipe(*[{**each, "compensation": "none"} for each in steps]), calibration=batches)
    assert plan.masks == bare.masks
    assert distances(model, plan, batches)[1] < distances(model, bare, batches)[1]
    before, after = masked(model, plan), repaired(model, plan)
    for (name, first), second in zip(before.named_parameters(), after.parameters(), strict=True):
        assert not second[first == 0].any(), name
    assert any(
        not torch.equal(first, second) for first, second in zip(before.parameters(), after.parameters(), strict=True)
    )


def test_all_of_a_block_learns_before_a_dropped_layer_and_where_single_weights_left():
    model = zoo.build("llama")
    whole = {"model.layers.0." + name for name, _ in model.model.layers[0].named_parameters()}
    for removed in ({"target": "layers", "remove": [1]}, WEIGHTS):
        plan = make_plan(
            model, recipe({**removed, "compensation": reconstruct(learning_rate=1e-3)}), calibration=batches_of(model)
        )
        assert whole <= plan.replacements.keys()


def test_blocks_before_the_first_loss_stay_as_they_are():
    model = zoo.build("llama")
    plan = make_plan(
        model,
        recipe({**NEURONS, "remove": {"model.layers.1.*": GONE}, "compensation": reconstruct(learning_rate=1e-3)}),
        calibration=batches_of(model),
    )
    learned = {".".join(name.split(".")[:3]) for name in plan.replacements}
    assert learned == {"model.layers.1", "model.layers.2"}


def test_what_comes_no_nearer_is_left_as_it_was_refitted():
    model = zoo.build("llama")
    batches = batches_of(model)
    refitted = make_plan(model, recipe({**NEURONS, "compensation": "least_squares"}), calibration=batches)
    wild = make_plan(model, recipe({**NEURONS, "compensation": reconstruct(learning_rate=1e30)}), calibration=batches)
    assert refitted.replacements.keys() == wild.replacements.keys()
    for name, values in refitted.replacements.items():
        assert torch.equal(values, wild.replacements[name])
    assert any("0 of 3 blocks learned" in note and "3 were left as they were" in note for note in wild.notes)


def test_the_smaller_model_is_the_masked_one():
    model = zoo.build("llama")
    batches = batches_of(model)
    before = copy.deepcopy(model)
    plan = make_plan(model, recipe({**NEURONS, "compensation": "reconstruct"}), calibration=batches)
    prune_(model, recipe({**NEURONS, "compensation": "reconstruct"}), calibration=batches)
    torch.testing.assert_close(
        outputs(model, batches[:1]), outputs(repaired(before, plan), batches[:1]), rtol=0, atol=1e-5
    )


def test_bfloat16_learns_too():
    model = zoo.build("llama", torch.bfloat16)
    batches = batches_of(model)
    plans = [
        make_plan(model, recipe({**NEURONS, "compensation": each}), calibration=batches)
        for each in ("least_squares", reconstruct(epochs=4))
    ]
    assert distances(model, plans[1], batches)[1] < distances(model, plans[0], batches)[1]
    assert {tensor.dtype for tensor in plans[1].replacements.values()} == {torch.bfloat16}


def test_on_disk_it_is_the_same():
    model = zoo.build("llama")
    batches = batches_of(model)
    here, there = (
        make_plan(
            model,
            recipe({**NEURONS, "compensation": reconstruct(epochs=2)}) | {"calibration": {"offload": offload}},
            calibration=batches,
        ).replacements
        for offload in ("none", "disk")
    )
    assert here.keys() == there.keys() and here
    assert all(torch.equal(here[name], there[name]) for name in here)


def test_the_random_state_and_the_model_are_as_before():
    model = zoo.build("llama")
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    make_plan(model, recipe({**NEURONS, "compensation": "reconstruct"}), calibration=batches_of(model, 2))
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_what_other_blocks_use_as_well_learns_nothing():
    t5, albert = zoo.build("t5"), zoo.build("albert")
    names = learning_parameters(t5, "encoder.block.0", t5.encoder.block[0])
    assert "layer.0.SelfAttention.q.weight" in names and "layer.0.layer_norm.weight" in names
    assert not any("relative_attention_bias" in name for name in names)
    tied = albert.albert.encoder.albert_layer_groups[0].albert_layers[0]
    tied.ffn_output.weight = albert.albert.embeddings.word_embeddings.weight
    names = learning_parameters(albert, "albert.encoder.albert_layer_groups.0.albert_layers.0", tied)
    assert "ffn.weight" in names and "ffn_output.weight" not in names


@pytest.mark.parametrize(
    ("name", "learning"),
    [
        ("llama", {"mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"}),
        ("bert", {f"{part}.dense.{kind}" for part in ("intermediate", "output") for kind in ("weight", "bias")}),
        ("mixtral", {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}),
    ],
)
def test_where_neurons_left_the_feed_forward_learns(name, learning):
    model = zoo.build(name)
    plan = make_plan(
        model,
        recipe(step("ffn_neurons", reconstruct(learning_rate=1e-3), sparsity=0.5)),
        calibration=batches_of(model),
    )
    block = min(name.partition(".0.")[0] for name in plan.replacements) + ".0."
    assert {name.removeprefix(block) for name in plan.replacements if name.startswith(block)} == learning


def test_only_the_stacks_of_the_steps_that_ask_for_it_learn():
    model = zoo.build("clip")
    batches = batches_of(model)
    text, vision = (site.name for site in inspect_model(model).of("layers"))
    steps = (
        step("ffn_neurons", compensation, include=[f"{stack}.*"])
        for stack, compensation in ((text, reconstruct(learning_rate=1e-3)), (vision, "least_squares"))
    )
    plan = make_plan(model, recipe(*steps), calibration=batches)
    fronts = {name for name in plan.replacements if ".fc1." in name}
    assert fronts and all(name.startswith(text) for name in fronts)
    assert any(name.startswith(vision) for name in plan.replacements)


def test_experts_that_left_are_chosen_no_more_while_a_block_learns():
    model = zoo.build("mixtral")
    batches = batches_of(model, 2)
    steps = [
        {"target": "experts", "sparsity": 0.5, "criterion": "l2"},
        {"target": "weights", "sparsity": 0.01, "criterion": "l1", "compensation": reconstruct(learning_rate=1e-12)},
    ]
    plan = make_plan(model, recipe(*steps), calibration=batches)
    errors = relative_errors(model, masked(model, plan), "model.layers", batches)
    (note,) = (note for note in plan.notes if "relative squared error" in note)
    said = float(note.partition("went from ")[2].split()[0])
    assert said == pytest.approx(sum(errors) / len(errors), rel=1e-2)


def test_weights_outside_of_the_stacks_are_an_error():
    model = zoo.build("electra")
    everything = {**WEIGHTS, "compensation": "reconstruct"}
    with pytest.raises(RecipeError, match=r"compensation works block by block, and .* is in no stack of blocks"):
        make_plan(model, recipe(everything), calibration=batches_of(model, 2))


def test_hidden_states_that_are_not_finite_are_an_error():
    model = zoo.build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.inf
    with pytest.raises(CalibrationError, match="not finite"):
        make_plan(
            model,
            recipe({"target": "weights", "sparsity": 0.5, "criterion": "random", "compensation": "reconstruct"}),
            calibration=batches_of(model, 2),
        )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"epochs": 0}, "epochs of compensation reconstruct is 0; expected a whole number of at least 1"),
        ({"epochs": 1.5}, "epochs of compensation reconstruct is 1.5; expected a whole number"),
        ({"learning_rate": 0}, "learning_rate of compensation reconstruct is 0; expected a number above 0"),
        ({"learning_rate": "1e-2"}, "learning_rate of compensation reconstruct is '1e-2'; expected a number"),
        ({"epoch": 1}, "unknown: epoch; did you mean 'epochs'"),
    ],
)
def test_bad_options_are_named(options, said):
    with pytest.raises(RecipeError, match=said):
        Recipe.load(recipe({**NEURONS, "compensation": reconstruct(**options)}))
