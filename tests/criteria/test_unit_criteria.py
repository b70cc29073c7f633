"""Fisher, fluctuation, APoZ, block influence, angular and loss change against plain loops and the model's own loss."""

import copy
import itertools
import math

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from hf_prune import make_plan
from hf_prune.apply.masks import clear_masks, set_masks
from hf_prune.calibration import collect
from hf_prune.criteria import get, loss_change
from hf_prune.criteria.combined import ranks
from hf_prune.errors import CalibrationError, RecipeError
from hf_prune.plan import KeepMasks
from hf_prune.structure import inspect_model
from tests import zoo
from tests.criteria.test_contract import labelled


def scores(criterion, model, site, batches, **options):
    scorer = get(criterion, options)
    return scorer.score_units(model, site, collect(model, batches, scorer.needs(site.target), [site]))


def inputs_of(model, module, batches, n_tokens=6):
    """What goes into `module`, (tokens, d_in), the padding behind `n_tokens` left out."""
    seen = []
    handle = model.get_submodule(module).register_forward_pre_hook(
        lambda module, args: seen.append(args[0].reshape(2, 8, -1)[:, :n_tokens].reshape(-1, args[0].shape[-1]))
    )
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize(("name", "target", "width"), [("bert", "ffn_neurons", 1), ("llama", "attention_heads", 16)])
def test_fisher_is_the_squared_gate_gradient_sample_by_sample_or_token_by_token(name, target, width, per_token):
    model = zoo.build(name, torch.float64)
    site = inspect_model(model).of(target)[1]
    batches = labelled(name, n_batches=1, size=3)
    gate = torch.ones(8 if per_token else 1, site.n_units, dtype=torch.float64, requires_grad=True)
    handle = model.get_submodule(site.reads[0].module).register_forward_pre_hook(
        lambda module, args: (args[0] * gate.repeat_interleave(width, dim=1),)
    )
    expected = torch.zeros(site.n_units, dtype=torch.float64)
    n_labels = 3 if name == "bert" else 3 * 7  # a causal model predicts all tokens but the first
    for sample in range(3):
        one = {key: value[sample : sample + 1] for key, value in batches[0].items()}
        loss = model(**{"labels": one["input_ids"], **one}).loss * (n_labels // 3)  # the sum over label tokens
        expected += torch.autograd.grad(loss, gate)[0].square().sum(0) / n_labels
    handle.remove()
    assert torch.allclose(scores("fisher", model, site, batches, per_token=per_token).double(), expected, rtol=1e-5)


def test_fisher_looks_at_the_first_samples_alone():
    model = zoo.build("bert")
    batches = labelled("bert", n_batches=3, size=3)
    step = {"target": "ffn_neurons", "sparsity": 0.5, "criterion": {"name": "fisher", "samples": 4}}
    n_seen = []
    handle = model.bert.encoder.layer[0].register_forward_pre_hook(lambda module, args: n_seen.append(len(args[0])))
    some = make_plan(model, {"version": 1, "prune": [step]}, calibration=batches)
    handle.remove()
    assert sum(n_seen) == 4
    first = [batches[0], {key: value[:1] for key, value in batches[1].items()}]
    plans = [
        make_plan(model, {"version": 1, "prune": [step | {"criterion": "fisher"}]}, calibration=each)
        for each in (first, batches)
    ]
    assert some.masks == plans[0].masks != plans[1].masks
    with pytest.raises(RecipeError, match="samples of criterion fisher is 0; expected at least 1"):
        get("fisher", {"samples": 0})


def test_fisher_draws_labels_from_the_models_own_distribution():
    """Over many seeds the mean over drawn labels is the expectation under the model, summed over all labels."""
    model = zoo.build("bert", torch.float64)
    site = inspect_model(model).of("ffn_neurons")[0]
    (batch,) = labelled("bert", n_batches=1, size=2)
    gate = torch.ones(1, site.n_units, dtype=torch.float64, requires_grad=True)
    handle = model.get_submodule(site.reads[0].module).register_forward_pre_hook(
        lambda module, args: (args[0] * gate,)
    )
    expected = torch.zeros(site.n_units, dtype=torch.float64)
    for sample in range(2):
        one = {key: value[sample : sample + 1] for key, value in batch.items() if key != "labels"}
        for log_probability in model(**one).logits[0].log_softmax(-1):
            (gradient,) = torch.autograd.grad(log_probability, gate, retain_graph=True)
            expected += log_probability.exp().detach() * gradient[0].square() / 2
    handle.remove()

    def squares(labels, seed=0, inputs=batch):
        found = collect(model, [inputs], get("fisher").needs("ffn_neurons"), [site], labels=labels, seed=seed)
        return found.squared_gate_gradients[site.key]

    drawn = torch.stack([squares("drawn", seed) for seed in range(400)])
    error = drawn.std(0) / len(drawn) ** 0.5
    assert ((drawn.mean(0) - expected).abs() < 5 * error + 1e-12).all()
    # the sum of both, over twice as many labels; the same labels for a sample whatever batch it is in
    assert torch.allclose(2 * squares("both"), squares("given") + squares("drawn"), rtol=1e-9)
    apart = [squares("drawn", inputs={key: value[n : n + 1] for key, value in batch.items()}) for n in range(2)]
    assert torch.allclose(sum(apart) / 2, squares("drawn"), rtol=1e-9)


def test_fisher_draws_the_next_token_where_one_is_wanted():
    model = zoo.build("llama", torch.float64)
    site = inspect_model(model).of("ffn_neurons")[0]
    (batch,) = labelled("llama", n_batches=1, size=2)
    step = {"target": "ffn_neurons", "sparsity": 0.5, "criterion": {"name": "fisher", "labels": "drawn"}}
    plan = make_plan(model, {"version": 1, "prune": [step]}, calibration=[batch])
    statistics = collect(model, [batch], get("fisher").needs("ffn_neurons"), [site], labels="drawn")
    assert statistics.n_labels == 2 * 7
    score = statistics.squared_gate_gradients[site.key]
    assert score[plan.masks.units[site.key]].min() >= score[~plan.masks.units[site.key]].max()
    with pytest.raises(RecipeError, match="labels of criterion fisher is 'all'; expected one of given, drawn, both"):
        get("fisher", {"labels": "all"})
    regression = zoo.build("bert", num_labels=1)
    inputs = {**labelled("bert", n_batches=1, size=2)[0], "labels": torch.zeros(2)}
    with pytest.raises(
        CalibrationError, match="labels can be drawn where the model has a row of logits for each label"
    ):
        make_plan(regression, {"version": 1, "prune": [step]}, calibration=[inputs])


@pytest.mark.parametrize("per_token", [False, True])
def test_fisher_of_layers_is_the_gate_on_what_a_layer_adds(per_token):
    model = zoo.build("bert", torch.float64)
    (site,) = inspect_model(model).of("layers")
    batches = labelled("bert", n_batches=1, size=3)
    positions = batches[0]["input_ids"].shape[1] if per_token else 1
    gates = [torch.ones(positions, 1, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    handles = [
        layer.register_forward_hook(lambda module, args, output, g=g: args[0] + g * (output - args[0]))
        for layer, g in zip(model.bert.encoder.layer, gates, strict=True)
    ]
    expected = torch.zeros(3, dtype=torch.float64)
    for sample in range(3):
        loss = model(**{key: value[sample : sample + 1] for key, value in batches[0].items()}).loss
        expected += torch.stack(torch.autograd.grad(loss, gates)).square().sum((1, 2)) / 3
    for handle in handles:
        handle.remove()
    assert torch.allclose(scores("fisher", model, site, batches, per_token=per_token).double(), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "target", "width"),
    [("gpt2", "ffn_neurons", 1), ("llama", "ffn_neurons", 1), ("llama", "attention_heads", 16)],
)
def test_fluctuation_is_the_variance_of_what_a_unit_writes(name, target, width):
    model = zoo.build(name, torch.float64)
    site = inspect_model(model).of(target)[0]
    batches = labelled(name, padded=True)
    read = site.reads[0].module
    x, weight = inputs_of(model, read, batches), model.get_submodule(read).weight.detach()
    columns = weight if name == "gpt2" else weight.T  # (d_in, d_out)
    expected = torch.zeros(site.n_units, dtype=torch.float64)
    for unit, entry in itertools.product(range(site.n_units), range(width)):
        j = unit * width + entry
        expected[unit] += sum((x[t, j] - x[:, j].mean()) ** 2 for t in range(len(x))) / len(x) * sum(columns[j] ** 2)
    assert torch.allclose(scores("fluctuation", model, site, batches).double(), expected, rtol=1e-5)


def test_a_unit_that_is_constant_does_not_fluctuate():
    model = zoo.build("bert", torch.float64)
    site = inspect_model(model).of("ffn_neurons")[0]
    with torch.no_grad():
        layer = model.bert.encoder.layer[0].intermediate.dense
        layer.weight[7], layer.bias[7] = 0, 3.0
    score = scores("fluctuation", model, site, labelled("bert"))
    assert score[7] < 1e-12 * score.max() and score.argmin() == 7


def test_apoz_counts_the_tokens_in_which_a_relu_neuron_fires():
    model = zoo.build("opt", torch.float64)
    site = inspect_model(model).of("ffn_neurons")[0]
    batches = labelled("opt", padded=True)
    with torch.no_grad():
        layer = model.model.decoder.layers[0].fc1
        layer.weight[[3, 4]], layer.bias[3], layer.bias[4] = 0, -1.0, 100.0
    x = inputs_of(model, site.reads[0].module, batches)
    assert (x == 0).any() and x[:, 3].max() == 0
    with torch.no_grad():  # with neuron 4 that loud, hardly any other is a tenth of the mean
        layer.bias[4] = 1.0
    x = inputs_of(model, site.reads[0].module, batches)
    expected = torch.zeros(site.n_units)
    for j in range(site.n_units):
        fires = [abs(x[t, j]) > 0.1 * x[t].square().mean().sqrt() for t in range(len(x))]
        expected[j] = sum(fires) / len(x)
    score = scores("apoz", model, site, batches)
    assert torch.allclose(score, expected)
    assert score[3] == 0 and score[4] == 1
    share = (x > 0).double().mean(0)  # the paper's own count: the same but for small values
    assert (score.double() <= share + 1e-6).all() and (score.double() - share).abs().mean() < 0.1


def test_apoz_with_a_smooth_activation_tells_silent_neurons_from_loud_ones():
    model = zoo.build("llama", torch.float64)
    site = inspect_model(model).of("ffn_neurons")[0]
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:24] *= 1e-3
    score = scores("apoz", model, site, labelled("llama"))
    assert score[:24].max() < score[24:].min()


def test_block_influence_is_how_far_a_layer_turns_its_input():
    model = zoo.build("llama", torch.float64)
    (site,) = inspect_model(model).of("layers")
    batches = labelled("llama", padded=True)
    expected = torch.zeros(3, dtype=torch.float64)
    n_tokens = 0
    with torch.no_grad():
        for batch in batches:
            states: list = []
            handles = [
                layer.register_forward_hook(
                    lambda module, args, output, states=states: states.append((args[0], output))
                )
                for layer in model.model.layers
            ]
            model(**batch)
            for handle in handles:
                handle.remove()
            for sample, position in itertools.product(range(2), range(6)):
                n_tokens += 1
                for number, (before, after) in enumerate(states):
                    x, y = before[sample, position], after[sample, position]
                    expected[number] += 1 - x @ y / (x.norm() * y.norm())
    assert torch.allclose(scores("block_influence", model, site, batches).double(), expected / n_tokens, rtol=1e-5)


# --------------------------------------------------------------------------------------------------------------
# angular


def turning(*angles):
    """A tiny Llama whose layers turn each pair of hidden entries by `angles`, in half turns."""
    model = zoo.build("llama", torch.float64, num_hidden_layers=len(angles))
    for layer, angle in zip(model.model.layers, angles, strict=True):

        def turn(hidden_states, *, angle=angle * math.pi, **rest):
            even, odd = hidden_states[..., ::2], hidden_states[..., 1::2]
            turned = even * math.cos(angle) - odd * math.sin(angle), even * math.sin(angle) + odd * math.cos(angle)
            return torch.stack(turned, -1).flatten(-2)

        layer.forward = turn
    (site,) = inspect_model(model).of("layers")
    return model, site


@pytest.mark.parametrize(
    ("n_removed", "expected"),
    [(1, [0.3, 0.3, 0.1, 0.4]), (2, [0.0, 0.0, 0.2, 0.5]), (3, [0.1, 0.1, 0.1, 0.2]), (0, [0.3, 0.3, 0.1, 0.4])],
)
def test_angular_of_layers_that_turn_by_hand(n_removed, expected):
    model, site = turning(0.3, -0.3, 0.1, 0.4)  # two turns add up: 0.3 and -0.3 undo each other
    score = scored("angular", model, site, labelled("llama", padded=True), n_removed)
    assert score.tolist() == pytest.approx(expected, abs=1e-6)


def test_angular_of_layers_that_hardly_turn_in_float32():
    model, site = turning(2e-5, 1e-5, 3e-5)
    score = scored("angular", model.float(), site, labelled("llama"), 1)
    assert score.tolist() == pytest.approx([2e-5, 1e-5, 3e-5], rel=1e-2)


def test_angular_passes_over_layers_that_left_before():
    model, site = turning(0.3, -0.3, 0.1, 0.4)
    there = torch.tensor([True, False, True, True])
    set_masks(model, KeepMasks(units={site.key: there}))
    score = scored("angular", model, site, labelled("llama"), 2, there)
    assert score.tolist() == pytest.approx([0.4, 0.0, 0.4, 0.5], abs=1e-6)


def test_a_plan_by_angular_takes_a_run_and_over_updates_runs_of_what_is_there():
    model, site = turning(0.3, -0.3, 0.1, 0.2, 0.45, 0.3)
    steps = {"version": 1, "prune": [{"target": "layers", "sparsity": 0.5, "criterion": "angular"}]}
    batches = labelled("llama")
    once = make_plan(model, steps, calibration=batches).masks.units[site.key]
    assert once.tolist() == [True, False, False, False, True, True]  # -0.3 + 0.1 + 0.2
    first = make_plan(model, steps, calibration=batches, progress=2 / 3)
    assert first.masks.units[site.key].tolist() == [False, False, True, True, True, True]
    set_masks(model, first.masks)
    second = make_plan(model, steps, calibration=batches, previous=first).masks.units[site.key]
    assert second.tolist() == [False, False, False, True, True, True]


@pytest.mark.parametrize("name", ["llama", "bart", "albert"])
def test_angular_is_the_mean_angle_of_tokens_over_a_run(name):
    model = zoo.build(name, torch.float64)
    site = inspect_model(model).of("layers")[-1]
    batches = labelled(name, padded=True)
    n_tokens = 6 if name != "bart" else 8  # its decoder's inputs aren't padded
    if name == "bart":
        batches = [{**batch, "decoder_input_ids": batch["input_ids"].flip(1)} for batch in batches]
    sums, n = [0.0] * (site.n_units - 1), 0
    with torch.no_grad():
        for batch in batches:
            states: list = []
            handles = [
                model.get_submodule(block).register_forward_hook(
                    lambda m, args, output, states=states: states.append(
                        (args[0], output if isinstance(output, torch.Tensor) else output[0])
                    )
                )
                for block in dict.fromkeys(site.blocks)
            ]
            model(**batch)
            for handle in handles:
                handle.remove()
            for sample, position in itertools.product(range(2), range(n_tokens)):
                n += 1
                for start in range(site.n_units - 1):
                    x, y = states[start][0][sample, position], states[start + 1][1][sample, position]
                    sums[start] += math.acos((x @ y / (x.norm() * y.norm())).item()) / math.pi
    means = [total / n for total in sums]
    expected = [min(means[max(0, unit - 1) : unit + 1]) for unit in range(site.n_units)]
    assert scored("angular", model, site, batches, 2).tolist() == pytest.approx(expected, rel=1e-5)


# --------------------------------------------------------------------------------------------------------------
# combined


def test_ranks_by_hand():
    found = ranks(torch.tensor([[3.0, 1.0, 3.0], [2.0, 0.0, 3.0]]))  # places 0, 1, 2, and 4 for each of 3, 4, 5
    assert torch.allclose(found, torch.tensor([[4.0, 1.0, 4.0], [2.0, 0.0, 4.0]], dtype=torch.float64) / 5)
    assert ranks(torch.tensor([7.0])).tolist() == [0.5] and ranks(torch.zeros(4)).tolist() == [0.5] * 4


@pytest.mark.parametrize("target", ["ffn_neurons", "attention_heads", "layers", "weights"])
def test_combined_is_the_weighted_sum_of_ranks(target):
    model = zoo.build("bert")
    structure = inspect_model(model)
    site = structure.weights[0] if target == "weights" else structure.of(target)[0]
    score = "score_weights" if target == "weights" else "score_units"
    criterion = get("combined", {"of": {"taylor": 0.3, "l2": 2, "random": {"weight": 0.7, "seed": 5}}})
    parts = {get("taylor"): 0.3, get("l2"): 2, get("random", {"seed": 5}): 0.7}
    statistics = collect(model, labelled("bert"), criterion.needs(target), [site])
    assert criterion.needs(target) == get("taylor").needs(target)
    expected = 0.0
    for part, weight in parts.items():
        values = getattr(part, score)(model, site, statistics).reshape(-1).tolist()
        n = len(values)
        places = {
            value: [place for place, other in enumerate(sorted(values)) if other == value] for value in {*values}
        }
        expected += weight * torch.tensor([sum(places[v]) / len(places[v]) / (n - 1) for v in values])
    found = getattr(criterion, score)(model, site, statistics)
    assert torch.allclose(found.reshape(-1), expected, atol=1e-6)


def test_combined_takes_the_seed_of_the_recipe_for_random():
    model = zoo.build("bert")
    of = {"random": {"weight": 5}, "l1": 1e-9}
    step = {"target": "ffn_neurons", "sparsity": 0.5, "criterion": {"name": "combined", "of": of}}
    plain = {"target": "ffn_neurons", "sparsity": 0.5, "criterion": "random"}
    for seed in (0, 7):
        combined, alone = (make_plan(model, {"version": 1, "seed": seed, "prune": [each]}) for each in (step, plain))
        assert combined.masks == alone.masks


# --------------------------------------------------------------------------------------------------------------
# loss change


def measured_loss(model, site, dropped, batches):
    """The model's own mean loss over label tokens without the layers `dropped`."""
    keep = torch.ones(site.n_units, dtype=torch.bool)
    keep[list(dropped)] = False
    set_masks(model, KeepMasks(units={site.key: keep}))
    total = n = 0
    with torch.no_grad():
        for batch in batches:
            batch = {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100), **batch}
            labels = batch["labels"]
            count = (labels[..., 1:] != -100).sum() if labels.dim() > 1 else len(labels)
            total, n = total + model(**batch).loss.double() * count, n + count
    clear_masks(model)
    return (total / n).item()


def ranked(model, batches, n_removed, **options):
    (site,) = inspect_model(model).of("layers")
    return site, scored("loss_change", model, site, batches, n_removed, **options)


def scored(criterion, model, site, batches, n_removed, there=None, **options):
    """By a criterion that runs the model by itself."""
    there = torch.ones(site.n_units, dtype=torch.bool) if there is None else there
    return get(criterion, options).rank_units(
        model, [site], batches, {site.key: n_removed}, {site.key: there}, seed=0
    )[site.key]


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "opt", "gpt_neox"])
def test_loss_change_is_the_loss_without_the_layer_less_the_loss_with_it(name):
    model = zoo.build(name, torch.float64)
    batches = labelled(name, padded=True)
    site, score = ranked(model, batches, 1, greedy=False)
    dense = measured_loss(model, site, [], batches)
    for layer in range(3):
        assert score[layer].item() == pytest.approx(measured_loss(model, site, [layer], batches) - dense, rel=1e-5)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_greedy_loss_change_measures_anew_after_each_removal(name):
    model = zoo.build(name, torch.float64, num_hidden_layers=5)
    batches = labelled(name)
    site, score = ranked(model, batches, 3)
    dropped = []
    for _ in range(3):
        losses = {n: measured_loss(model, site, [*dropped, n], batches) for n in range(5) if n not in dropped}
        dropped.append(min(losses, key=losses.get))
    assert score.argsort()[:3].tolist() == dropped


def test_greedy_differs_from_one_shot_where_layers_stand_in_for_each_other():
    model = zoo.build("llama", torch.float64, num_hidden_layers=4)
    layers = model.model.layers
    with torch.no_grad():
        layers[0].self_attn.o_proj.weight.mul_(0.01)
        layers[0].mlp.down_proj.weight.mul_(0.01)
    for layer in layers[1:3]:  # they undo each other: alone each does harm, together they do nothing
        layer.forward = lambda hidden_states, **rest: hidden_states.flip(-1)
    batches = labelled("llama")
    site, greedy = ranked(model, batches, 2)
    losses = {pair: measured_loss(model, site, pair, batches) for pair in itertools.permutations(range(4), 2)}
    first = min(range(4), key=lambda n: measured_loss(model, site, [n], batches))
    second = min((n for n in range(4) if n != first), key=lambda n: losses[first, n])
    assert greedy.argsort()[:2].tolist() == [first, second]


def loss_without(model, site, units, batches):
    """The model's own mean loss with `units` of a site masked for good."""
    return measured_loss(copy.deepcopy(model), site, units, batches)


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("bert", "attention_heads"),
        ("llama", "attention_heads"),
        ("llama", "ffn_neurons"),
        ("gpt2", "attention_heads"),
        ("bloom", "ffn_neurons"),
        ("albert", "attention_heads"),  # the block is called three times: through the whole model
    ],
)
def test_loss_change_of_heads_and_neurons_is_the_loss_with_the_unit_masked(name, target):
    model = zoo.build(name, torch.float64)
    batches = labelled("bert" if name == "albert" else name, padded=True)
    sites = inspect_model(model).of(target)
    there = {site.key: torch.ones(site.n_units, dtype=torch.bool) for site in sites}
    keys = dict.fromkeys(there, 1)
    found = get("loss_change").rank_units(model, sites, batches, keys, there, 0)
    assert found.keys() == there.keys()
    for site in sites:
        dense = loss_without(model, site, [], batches)
        for unit in range(0, site.n_units, 1 if site.n_units < 9 else 11):
            expected = loss_without(model, site, [unit], batches) - dense
            assert found[site.key][unit].item() == pytest.approx(expected, rel=1e-4, abs=2e-6)  # float32 losses


def test_loss_change_of_heads_of_an_encoder_and_a_decoder():
    torch.manual_seed(0)
    sizes = dict(vocab_size=99, d_model=32, d_ff=48, d_kv=8, num_layers=2, num_decoder_layers=3, num_heads=4)
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).double().eval()
    batches = [{**batch, "labels": batch["input_ids"].flip(1)} for batch in labelled("llama", padded=True)]

    def loss(changed):
        with torch.no_grad():
            return sum(changed(**batch).loss.item() for batch in batches) / 2  # as many labels in each

    sites = inspect_model(model).of("attention_heads")
    assert {site.name.split(".")[0] for site in sites} == {"encoder", "decoder"}
    there = {site.key: torch.ones(site.n_units, dtype=torch.bool) for site in sites}
    found = get("loss_change").rank_units(model, sites, batches, dict.fromkeys(there, 1), there, 0)
    for site in sites:
        for unit in range(4):
            masked = copy.deepcopy(model)
            set_masks(masked, KeepMasks(units={site.key: torch.arange(4) != unit}))
            assert found[site.key][unit].item() == pytest.approx(loss(masked) - loss(model), rel=1e-4, abs=2e-6)


def test_for_each_head_only_its_block_and_those_behind_are_run():
    model = zoo.build("bert", num_hidden_layers=5)
    sites = inspect_model(model).of("attention_heads")
    there = {site.key: torch.ones(4, dtype=torch.bool) for site in sites}
    n_calls = [0] * 5
    for number, layer in enumerate(model.bert.encoder.layer):

        def count(module, args, number=number):
            n_calls[number] += 1

        layer.attention.register_forward_pre_hook(count)
    get("loss_change").rank_units(model, sites, labelled("bert", n_batches=1), dict.fromkeys(there, 1), there, 0)
    # three more: for the loss of the whole model, to record the calls, and on the way to the next block
    assert n_calls == [3 + 4 * (number + 1) for number in range(5)]


def test_greedy_loss_change_of_heads_measures_anew_within_their_site():
    model = zoo.build("bert", torch.float64)
    batches = labelled("bert")
    site = inspect_model(model).of("attention_heads")[1]
    score = scored("loss_change", model, site, batches, 3, greedy=True)
    dropped: list = []
    for _ in range(3):
        losses = {n: loss_without(model, site, [*dropped, n], batches) for n in range(4) if n not in dropped}
        dropped.append(min(losses, key=losses.get))
    assert score.argsort()[:3].tolist() == dropped


def test_loss_change_passes_over_units_that_left_before():
    model = zoo.build("llama", torch.float64, num_hidden_layers=5)
    batches = labelled("llama")
    (site,) = inspect_model(model).of("layers")
    there = torch.tensor([True, True, False, True, True])
    set_masks(model, KeepMasks(units={site.key: there}))
    score = scored("loss_change", model, site, batches, 2, there)
    clear_masks(model)
    dropped = [2]
    for _ in range(2):
        losses = {n: measured_loss(model, site, [*dropped, n], batches) for n in range(5) if n not in dropped}
        dropped.append(min(losses, key=losses.get))
    assert score.masked_fill(~there, torch.inf).argsort()[:2].tolist() == dropped[1:]
    assert score[2] == 0


def test_loss_change_without_labels_or_with_a_shared_block():
    model = zoo.build("bert")
    unlabelled = [{key: value for key, value in batch.items() if key != "labels"} for batch in labelled("bert")]
    with pytest.raises(CalibrationError, match=r"gave no loss .* Add the labels"):
        ranked(model, unlabelled, 1)
    with pytest.raises(RecipeError, match="one block called 3 times"):
        ranked(zoo.build("albert"), labelled("bert"), 1)


def test_loss_change_looks_at_as_many_samples_as_it_is_told():
    model = zoo.build("llama", torch.float64)
    batches = labelled("llama", n_batches=3)
    _, few = ranked(model, batches, 1, greedy=False, samples=3)
    cut = [batches[0], {key: value[:1] for key, value in batches[1].items()}]
    _, same = ranked(model, cut, 1, greedy=False)
    assert torch.equal(few, same)


def test_greedy_loss_change_measures_few_units_anew(monkeypatch):
    alone = torch.rand(30, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    tried_in_all = []
    monkeypatch.setattr(loss_change, "mean_losses", lambda m, b, measure, n: _table(measure, tried_in_all, alone))
    score = loss_change._rank(None, [], lambda number, out, tried: (out, tried), range(30), 6, torch.tensor(0.0))
    dropped = []
    for _ in range(6):
        left = [unit for unit in range(30) if unit not in dropped]
        dropped.append(min(left, key=lambda unit: _loss_without([*dropped, unit], alone)))
    assert score.argsort()[:6].tolist() == dropped
    assert len(tried_in_all) < 30 + 5 * 15


def _loss_without(out, alone):
    """What each does alone, and more for every pair, the nearer the more: others that leave only make a unit dearer."""
    return sum(alone[unit] for unit in out) + sum(0.3 / abs(a - b) for a, b in itertools.combinations(out, 2))


def _table(measure, tried_in_all, alone):
    out, tried = measure(0)
    tried_in_all.extend(tried)
    return torch.tensor([_loss_without([*out, unit], alone) for unit in tried], dtype=torch.float64)
