"""What is left is refitted: exactly where that can be, nearer to the dense model everywhere, and never in silence."""

import copy

import pytest
import torch
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

from hf_prune import apply_, make_plan
from hf_prune.apply.masks import set_masks
from hf_prune.errors import CalibrationError, RecipeError, UnsupportedModelError
from hf_prune.plan import PruningPlan
from hf_prune.structure import inspect_model
from hf_prune.structure.inputs import example_inputs
from tests import zoo


def batches_of(model, n=10, seed=0, length=16):
    return [example_inputs(model, seed=seed + number, length=length, batch_size=4) for number in range(n)]


def outputs(model, batches):
    with torch.no_grad():
        return torch.cat([_main(model(**batch)).reshape(-1) for batch in batches])


def _main(found):
    for name in ("logits", "logits_per_text", "last_hidden_state"):
        if found.get(name) is not None:
            return found[name]
    raise AssertionError(list(found))


def recipe(*steps):
    return {"version": 1, "prune": list(steps)}


def step(target, compensation="least_squares", sparsity=0.25, **more):
    if not {"remove", "pattern"} & more.keys():
        more["sparsity"] = sparsity
    return {"target": target, "compensation": compensation, **more}


def masked(model, plan):
    """A copy with the plan's masks and nothing made up for."""
    copied = copy.deepcopy(model)
    set_masks(copied, plan.masks)
    return copied


def repaired(model, plan):
    copied = copy.deepcopy(model)
    apply_(copied, plan)
    return copied


def distances(model, plan, batches):
    """From the dense outputs: (masked only, repaired)."""
    dense = outputs(model, batches)
    return tuple(
        (outputs(other, batches) - dense).norm().item() for other in (masked(model, plan), repaired(model, plan))
    )


# --------------------------------------------------------------------------------------------------------------
# exactly

EXACT = {"gpt2": 1e-8, "llama": 1e-7, "phi3": 1e-7}  # RMS norms work in float32 whatever the model's dtype


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_neurons_that_others_stand_in_for_are_repaired_exactly(name):
    model = zoo.build(name, torch.float64)
    stack = model.transformer.h if name == "gpt2" else model.model.layers
    with torch.no_grad():
        for layer in stack:
            inner = layer.mlp
            if name == "gpt2":  # Conv1D: neuron 0 is neuron 1
                inner.c_fc.weight[:, 0], inner.c_fc.bias[0] = inner.c_fc.weight[:, 1], inner.c_fc.bias[1]
            elif name == "phi3":  # fused [gate | up]
                for offset in (0, 48):
                    inner.gate_up_proj.weight[offset] = inner.gate_up_proj.weight[offset + 1]
            else:  # what neuron 0 gives is 2 and 3 together: one gate, ups that add up
                gate, up = inner.gate_proj.weight, inner.up_proj.weight
                gate[0] = gate[2]
                gate[3] = gate[2]
                up[0] = 0.5 * up[2] - 2.0 * up[3]
    name_of = {"gpt2": "transformer.h.*", "llama": "model.layers.*", "phi3": "model.layers.*"}[name]
    plan = make_plan(model, recipe(step("ffn_neurons", remove={name_of: [0]})), calibration=batches_of(model, 20))
    without, with_repair = distances(model, plan, batches_of(model, 2, seed=100))
    scale = outputs(model, batches_of(model, 2, seed=100)).norm().item()
    assert without > 1e-3 * scale
    assert with_repair <= EXACT[name] * scale


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_head_that_another_repeats_is_repaired_exactly(name):
    model = zoo.build(name, torch.float64)
    with torch.no_grad():
        if name == "gpt2":  # [q | k | v], four heads of 8 each
            for layer in model.transformer.h:
                for start in (0, 32, 64):
                    for tensor in (layer.attn.c_attn.weight, layer.attn.c_attn.bias):
                        tensor[..., start : start + 8] = tensor[..., start + 8 : start + 16]
        else:  # two groups: one key and value, two queries of 8
            for layer in model.model.layers:
                attention = layer.self_attn
                attention.q_proj.weight[:16] = attention.q_proj.weight[16:]
                attention.k_proj.weight[:8] = attention.k_proj.weight[8:]
                attention.v_proj.weight[:8] = attention.v_proj.weight[8:]
    plan = make_plan(model, recipe(step("attention_heads", remove={"*": [0]})), calibration=batches_of(model, 20))
    without, with_repair = distances(model, plan, batches_of(model, 2, seed=100))
    scale = outputs(model, batches_of(model, 2, seed=100)).norm().item()
    assert without > 1e-3 * scale
    assert with_repair <= EXACT[name] * scale


@pytest.mark.parametrize("name", ["llama", "opt", "t5", "vit", "gpt_neox", "gpt2"])
def test_linear_refits_the_one_projection_before_the_dropped_layer(name):
    model = zoo.build(name, torch.float64)
    (site, *_) = inspect_model(model).of("layers")
    plan = make_plan(
        model, recipe(step("layers", "linear", remove=[2], include=[site.name])), calibration=batches_of(model)
    )
    touched = {parameter.rpartition(".")[0] for parameter in plan.replacements}
    assert len(touched) == 1 and touched.pop().startswith(f"{site.blocks[1]}.")
    without, with_repair = distances(model, plan, batches_of(model, 2, seed=100))
    assert with_repair < without


# --------------------------------------------------------------------------------------------------------------
# nearer, on every family


@pytest.mark.parametrize("target", ["ffn_neurons", "attention_heads"])
@pytest.mark.parametrize("name", sorted(set(zoo.MODELS) - {"albert"}))
def test_a_repaired_model_is_nearer_on_inputs_held_out(name, target):
    model = zoo.build(name, torch.float64)
    if not inspect_model(model).of(target):
        pytest.skip(f"{name} has no {target} to remove")
    with (
        torch.no_grad()
    ):  # neurons and heads that share causes, as trained ones do: there is something to make up from
        for site in inspect_model(model).of(target):
            for piece in site.slices:
                tensor = getattr(model.get_submodule(piece.module), piece.tensor)
                if piece.writes and tensor.dim() > 1:
                    for span in piece.spans:
                        inside = tensor.narrow(piece.dim, span.start, site.n_units * span.width)
                        units = inside.unflatten(piece.dim, (site.n_units, span.width))
                        units.mul_(0.3).add_(units.mean(piece.dim, keepdim=True))
    plan = make_plan(model, recipe(step(target, sparsity=0.5)), calibration=batches_of(model))
    assert plan.replacements
    for read in {read.module for site in inspect_model(model).of(target) for read in site.reads}:
        assert f"{read}.weight" in plan.replacements
    without, with_repair = distances(model, plan, batches_of(model, 2, seed=100))
    assert 0 < with_repair < without


def test_a_shared_block_is_refused():
    model = zoo.build("albert")
    with pytest.raises(RecipeError, match="called 3 times"):
        make_plan(model, recipe(step("ffn_neurons")), calibration=batches_of(model, 2))
    with pytest.raises(RecipeError, match="called 3 times"):
        make_plan(
            model,
            recipe({"target": "weights", "sparsity": 0.5, "criterion": "sparsegpt", "include": ["*ffn*"]}),
            calibration=batches_of(model, 2),
        )


# --------------------------------------------------------------------------------------------------------------
# bias


@pytest.mark.parametrize("name", ["opt", "gpt2", "bert"])
def test_bias_is_the_mean_of_what_left(name):
    model = zoo.build(name, torch.float64)
    site = inspect_model(model).of("ffn_neurons")[0]
    out = site.reads[0].module
    batches = batches_of(model, 6)
    plan = make_plan(model, recipe(step("ffn_neurons", "bias", 0.5, include=[f"{site.name}*"])), calibration=batches)
    assert list(plan.replacements) == [f"{out}.bias"]
    module, seen = model.get_submodule(out), []
    handle = module.register_forward_pre_hook(lambda module, args: seen.append(args[0].reshape(-1, args[0].shape[-1])))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    columns = module.weight.detach() if name == "gpt2" else module.weight.detach().T  # (d_in, d_out)
    gone = torch.nonzero(~plan.masks.units[site.key]).reshape(-1).tolist()
    lost, n_tokens = torch.zeros(columns.shape[1], dtype=torch.float64), 0
    for x in seen:
        for token in x:
            n_tokens += 1
            for j in gone:
                lost += token[j] * columns[j]
    assert torch.allclose(plan.replacements[f"{out}.bias"], module.bias.detach() + lost / n_tokens, atol=1e-10)


def test_bias_where_there_is_none_is_refused():
    model = zoo.build("llama")
    with pytest.raises(RecipeError, match=r"down_proj has no bias to take what left; use least_squares"):
        make_plan(model, recipe(step("ffn_neurons", "bias")), calibration=batches_of(model, 2))


# --------------------------------------------------------------------------------------------------------------
# layers


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "t5", "vit", "gpt_neox", "bloom", "falcon-old", "whisper"])
def test_least_squares_over_layers_refits_what_comes_before_and_behind(name):
    model = zoo.build(name, torch.float64)
    sites = [site for site in inspect_model(model).of("layers") if site.n_units == 3]
    plan = make_plan(model, recipe(step("layers", remove=[1], include=[sites[0].name])), calibration=batches_of(model))
    touched = {parameter.rpartition(".")[0] for parameter in plan.replacements}
    blocks = sites[0].blocks
    assert any(each.startswith(f"{blocks[0]}.") for each in touched)
    assert any(each.startswith(f"{blocks[2]}.") for each in touched)
    assert not any(each.startswith(f"{blocks[1]}.") for each in touched)
    without, with_repair = distances(model, plan, batches_of(model, 2, seed=100))
    assert with_repair < without


@pytest.mark.parametrize("compensation", ["linear", "least_squares"])
def test_a_dropped_beginning_is_said(compensation):
    model = zoo.build("llama", torch.float64)
    plan = make_plan(model, recipe(step("layers", compensation, remove=[0])), calibration=batches_of(model, 6))
    assert any("nothing makes up for the first 1 layers" in note for note in plan.notes), plan.notes
    assert bool(plan.replacements) == (compensation == "least_squares")


@pytest.mark.parametrize("name", ["bert", "bart", "gemma2", "olmo2"])
def test_layers_that_end_in_a_norm_are_refused(name):
    model = zoo.build(name)
    site = next(site for site in inspect_model(model).of("layers") if site.n_units == 3)
    with pytest.raises(
        UnsupportedModelError, match=r"its output is no plain sum .* Use compensation reconstruct for layers, or none"
    ):
        make_plan(
            model, recipe(step("layers", "linear", remove=[1], include=[site.name])), calibration=batches_of(model, 2)
        )


# --------------------------------------------------------------------------------------------------------------
# what is asked, said, and left alone


@pytest.mark.parametrize(("target", "compensation"), [("ffn_neurons", "least_squares"), ("layers", "linear")])
def test_compensation_needs_calibration(target, compensation):
    for calibration in (None, []):
        with pytest.raises(CalibrationError, match=f"compensation {compensation} of {target} is fitted on data"):
            make_plan(zoo.build("llama"), recipe(step(target, compensation, 0.34)), calibration=calibration)


def test_the_plan_says_what_was_refitted():
    model = zoo.build("llama", torch.float64)
    batches = batches_of(model, 5)
    batches[0]["attention_mask"][:, 10:] = 0
    plan = make_plan(model, recipe(step("ffn_neurons")), calibration=batches)
    n_tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    (note,) = [note for note in plan.notes if "refitted" in note]
    assert f"on {n_tokens} tokens" in note
    unchanged = int(note.split("; ")[1].split()[0]) if ";" in note else 0
    assert int(note.split()[0]) + unchanged == 3


def test_an_encoder_without_repair_is_seen_by_the_decoder_with_it():
    model = zoo.build("bart", torch.float64)
    batches = batches_of(model, 8)
    both = recipe(
        step("ffn_neurons", "none", 0.75, include=["encoder.*"]),
        step("attention_heads", "least_squares", 0.5, include=["decoder.*.encoder_attn*"]),
    )
    plan = make_plan(model, both, calibration=batches)
    alone = make_plan(model, recipe(both["prune"][1]), calibration=batches)
    assert plan.replacements.keys() == alone.replacements.keys()
    assert any(not torch.allclose(plan.replacements[name], alone.replacements[name]) for name in plan.replacements)
    # what the decoder alone was fitted on is not what it gets
    other = copy.deepcopy(plan)
    other.replacements = alone.replacements
    held_out = batches_of(model, 2, seed=100)
    assert distances(model, plan, held_out)[1] < distances(model, other, held_out)[1]


def test_a_plan_with_new_values_is_saved_and_loaded(tmp_path):
    model = zoo.build("gpt2")
    plan = make_plan(model, recipe(step("ffn_neurons")), calibration=batches_of(model, 3))
    plan.save(tmp_path)
    loaded = PruningPlan.load(tmp_path)
    assert loaded.notes == plan.notes and loaded.masks == plan.masks
    assert loaded.replacements.keys() == plan.replacements.keys()
    assert all(torch.equal(loaded.replacements[name], value) for name, value in plan.replacements.items())
    batches = batches_of(model, 1)
    assert torch.equal(outputs(repaired(model, loaded), batches), outputs(repaired(model, plan), batches))


def test_experts_that_get_other_tokens_than_before_are_an_error():
    torch.manual_seed(0)
    sizes = dict(vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4)
    experts = dict(num_experts=4, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1)
    model = SwitchTransformersForConditionalGeneration(SwitchTransformersConfig(**sizes, **experts)).eval()
    batches = [
        {"input_ids": torch.randint(99, (4, 16)), "decoder_input_ids": torch.randint(99, (4, 8))} for _ in range(4)
    ]
    with pytest.raises(
        CalibrationError, match=r"experts\.expert_\d\.wo can't be refitted: the pruned model sends it other"
    ):
        make_plan(model, recipe(step("ffn_neurons", "least_squares", sparsity=0.5)), calibration=batches)
