"""Fisher, fluctuation, APoZ, block influence and loss change against plain loops and the model's own loss."""

import itertools

import pytest
import torch

from hf_prune.apply.masks import clear_masks, set_masks
from hf_prune.calibration import collect
from hf_prune.criteria import get
from hf_prune.errors import CalibrationError, RecipeError
from hf_prune.plan import KeepMasks
from hf_prune.structure import inspect_model
from tests import zoo
from tests.criteria.test_contract import labelled


def scores(criterion, model, site, batches):
    statistics = collect(model, batches, get(criterion).needs(site.target), [site])
    return get(criterion).score_units(model, site, statistics)


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


@pytest.mark.parametrize(("name", "target", "width"), [("bert", "ffn_neurons", 1), ("llama", "attention_heads", 16)])
def test_fisher_is_the_squared_gate_gradient_sample_by_sample(name, target, width):
    model = zoo.build(name, torch.float64)
    site = inspect_model(model).of(target)[1]
    batches = labelled(name, n_batches=1, size=3)
    gate = torch.ones(site.n_units, dtype=torch.float64, requires_grad=True)
    handle = model.get_submodule(site.reads[0].module).register_forward_pre_hook(
        lambda module, args: (args[0] * gate.repeat_interleave(width),)
    )
    expected = torch.zeros(site.n_units, dtype=torch.float64)
    n_labels = 3 if name == "bert" else 3 * 7  # a causal model predicts all tokens but the first
    for sample in range(3):
        one = {key: value[sample : sample + 1] for key, value in batches[0].items()}
        loss = model(**{"labels": one["input_ids"], **one}).loss * (n_labels // 3)  # the sum over label tokens
        expected += torch.autograd.grad(loss, gate)[0].square() / n_labels
    handle.remove()
    assert torch.allclose(scores("fisher", model, site, batches).double(), expected, rtol=1e-5)


def test_fisher_of_layers_is_the_gate_on_what_a_layer_adds():
    model = zoo.build("bert", torch.float64)
    (site,) = inspect_model(model).of("layers")
    batches = labelled("bert", n_batches=1, size=3)
    gates = [torch.ones((), dtype=torch.float64, requires_grad=True) for _ in range(3)]
    handles = [
        layer.register_forward_hook(lambda module, args, output, g=g: args[0] + g * (output - args[0]))
        for layer, g in zip(model.bert.encoder.layer, gates, strict=True)
    ]
    expected = torch.zeros(3, dtype=torch.float64)
    for sample in range(3):
        loss = model(**{key: value[sample : sample + 1] for key, value in batches[0].items()}).loss
        expected += torch.stack(torch.autograd.grad(loss, gates)).square() / 3
    for handle in handles:
        handle.remove()
    assert torch.allclose(scores("fisher", model, site, batches).double(), expected, rtol=1e-5)


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
    return site, get("loss_change", options).rank_units(model, [site], batches, {site.key: n_removed}, 0)[site.key]


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
        # 1 and 2 undo each other: alone each does harm, together they do nothing
        for layer in (layers[1], layers[2]):
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        layers[0].self_attn.o_proj.weight.mul_(0.01)
        layers[0].mlp.down_proj.weight.mul_(0.01)
    layers[1].register_forward_hook(lambda module, args, output: output.flip(-1))
    layers[2].register_forward_hook(lambda module, args, output: output.flip(-1))
    batches = labelled("llama")
    site, greedy = ranked(model, batches, 2)
    losses = {pair: measured_loss(model, site, pair, batches) for pair in itertools.permutations(range(4), 2)}
    first = min(range(4), key=lambda n: measured_loss(model, site, [n], batches))
    second = min((n for n in range(4) if n != first), key=lambda n: losses[first, n])
    assert greedy.argsort()[:2].tolist() == [first, second]


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
