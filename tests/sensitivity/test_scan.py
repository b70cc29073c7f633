"""The scan against whole models pruned one site at a time; what it refuses."""

import copy
import itertools
import json

import pytest
import torch
import transformers

import hf_prune
from hf_prune.apply.masks import set_masks
from hf_prune.sensitivity import scan
from hf_prune.structure import inspect_model
from tests import zoo
from tests.criteria.test_contract import labelled


GRID = (0.25, 0.5)
# by target: a criterion that a plain plan takes too
CRITERIA = {"layers": "block_influence", "attention_heads": "l2", "ffn_neurons": "activation", "weights": "wanda"}


def data(name):
    """With a loss to measure; the models without a head have none."""
    batches = labelled("bert" if name in ("bert", "albert") else "llama", padded=True)
    if name == "albert":
        batches = [batch | {"labels": torch.tensor([0, 1])} for batch in batches]
    return batches


@torch.no_grad()
def mean_loss(model, batches):
    """Over all label tokens, one sample at a time."""
    total = count = 0.0
    for batch in batches:
        for row in range(len(batch["input_ids"])):
            inputs = {name: value[row : row + 1] for name, value in batch.items()}
            logits = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits.double()
            if "labels" in inputs:
                labels = inputs["labels"]
            else:
                labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)[:, 1:].reshape(-1)
                logits = logits[0, :-1]
            total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100))
            count += int((labels != -100).sum())
    return total / count


@pytest.mark.parametrize(
    "name", ["llama", "albert", *(pytest.param(name, marks=pytest.mark.slow) for name in ("bert", "gpt2"))]
)
@pytest.mark.parametrize("target", CRITERIA)
def test_each_point_is_the_loss_of_the_model_so_pruned(name, target):
    model, batches = zoo.build(name, torch.float64), data(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    criterion = CRITERIA[target]
    found = scan(model, batches, targets=[target], criteria={target: criterion}, sparsities=GRID, samples=99)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), "the model has changed"
    assert found.loss == pytest.approx(mean_loss(model, batches), rel=1e-6)
    structure = inspect_model(model)
    sites = structure.weights if target == "weights" else structure.of(target)
    assert [curve.key for curve in found.sites] == [site.key for site in sites]
    for site, curve in [*zip(sites, found.sites, strict=True)][:: 9 if target == "weights" else 1]:
        for sparsity, share, loss in zip(GRID, curve.sparsities, curve.losses, strict=True):
            step = {"target": target, "sparsity": sparsity, "criterion": criterion}
            step["include"] = [getattr(site, "module", site.name)]
            plan = hf_prune.make_plan(model, {"version": 1, "prune": [step]}, calibration=batches)
            other = copy.deepcopy(model)
            set_masks(other, plan.masks)
            (keep,) = (*plan.masks.units.values(), *plan.masks.weights.values())
            assert share == pytest.approx(float((~keep).double().mean()))
            assert loss == pytest.approx(mean_loss(other, batches), rel=1e-6)


def test_layers_are_taken_out_one_at_a_time_too():
    model, batches = zoo.build("llama", torch.float64), data("llama")
    found = scan(model, batches, targets=["layers"], sparsities=GRID, samples=99)
    for number, layer in enumerate(found.layers):
        other = copy.deepcopy(model)
        set_masks(
            other, hf_prune.make_plan(model, {"version": 1, "prune": [{"target": "layers", "remove": [number]}]}).masks
        )
        assert layer["name"] == f"model.layers.{number}"
        assert layer["loss"] == pytest.approx(mean_loss(other, batches), rel=1e-6)


def test_what_is_in_no_block_is_measured_on_the_whole_model():
    """BERT's pooler, behind all blocks."""
    model, batches = zoo.build("bert", torch.float64), data("bert")
    found = scan(model, batches, targets=["weights"], sparsities=(0.5,), samples=99)
    assert any("pooler" in curve.name and curve.losses[0] != found.loss for curve in found.sites)


@pytest.mark.parametrize("target", ["layers", "attention_heads", "ffn_neurons"])
def test_an_encoder_is_measured_through_its_decoder(target):
    transformers.set_seed(0)
    sizes = dict(vocab_size=99, d_model=32, d_ff=48, d_kv=8, num_layers=2, num_decoder_layers=2, num_heads=4)
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0)
    ).double().eval()  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    batches = [batch | {"labels": batch["input_ids"].flip(1)} for batch in labelled("llama")]
    found = scan(model, batches, targets=[target], criteria={target: "l2"}, sparsities=(0.5,), samples=99)
    assert {curve.name.split(".")[0] for curve in found.sites} == {"encoder", "decoder"}
    for curve in found.sites:
        step = {"target": target, "sparsity": 0.5, "criterion": "l2", "include": [curve.name]}
        other = copy.deepcopy(model)
        set_masks(other, hf_prune.make_plan(model, {"version": 1, "prune": [step]}).masks)
        with torch.no_grad():
            expected = sum(float(other(**batch).loss) for batch in batches) / len(batches)  # as many labels in each
        assert curve.losses == [pytest.approx(expected, rel=1e-6)], curve.name


def test_the_number_of_samples_and_the_size_of_batches():
    model, batches = zoo.build("llama"), labelled("llama", n_batches=4)
    few = scan(model, batches, targets=["ffn_neurons"], criteria={"ffn_neurons": "l2"}, sparsities=GRID, samples=3)
    three = [{k: v[:n] for k, v in batch.items()} for batch, n in ((batches[0], 2), (batches[1], 1))]
    assert few.n_samples == 3
    assert few.loss == pytest.approx(mean_loss(model, three), rel=1e-5)
    joined = [{k: torch.cat([batch[k] for batch in batches]) for k in batches[0]}]
    runs = [
        scan(model, each, targets=["ffn_neurons"], sparsities=GRID, samples=8) for each in (batches, joined)
    ]  # fmt: skip
    for one, other in zip(*(run.sites for run in runs), strict=True):
        assert one.losses == pytest.approx(other.losses, rel=1e-5)


def test_the_curves_serve_as_an_allocation(tmp_path):
    """What the greedy allocation removes costs no more loss, by the curves, than equal shares do."""
    model, batches = zoo.build("llama", num_hidden_layers=5), labelled("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight *= 4  # a feed-forward that matters
        model.model.layers[3].mlp.down_proj.weight *= 0.1  # and one that doesn't
    found = scan(model, batches, targets=["ffn_neurons"], criteria={"ffn_neurons": "l2"}, sparsities=(0.25, 0.5, 0.75))
    found.to_json(tmp_path / "curves.json")
    assert json.loads((tmp_path / "curves.json").read_text()) == json.loads(json.dumps(found.to_dict()))
    step = {"target": "ffn_neurons", "sparsity": 0.5, "criterion": "l2"}
    step["allocation"] = {"name": "sensitivity", "file": str(tmp_path / "curves.json")}
    masks = hf_prune.make_plan(model, {"version": 1, "prune": [step]}).masks.units
    lost = [float((~keep).double().mean()) for keep in masks.values()]
    assert sum(lost) == pytest.approx(2.5)

    def cost(share, curve):
        points = [(0.0, found.loss), *zip(curve.sparsities, curve.losses, strict=True)]
        for (x0, y0), (x1, y1) in itertools.pairwise(points):
            if x0 <= share <= x1:
                return y0 + (y1 - y0) * (share - x0) / (x1 - x0) - found.loss
        raise AssertionError(share)

    assert sum(map(cost, lost, found.sites)) <= sum(cost(0.5, curve) for curve in found.sites) + 1e-9
    assert len(set(lost)) > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsities": (0.5, 1.0)}, r"the sparsities are \[0.5, 1.0\]; expected fractions between 0 and 1"),
        ({"samples": 0}, "samples is 0; expected at least 1"),
        ({"targets": ["neurons"]}, "'neurons' is not allowed"),
        ({"targets": ["weights"], "criteria": {"weights": "wandaa"}}, "did you mean 'wanda'"),
        (
            {"targets": ["weights"], "criteria": {"weights": "sparsegpt"}},
            "sparsegpt doesn't score weights .* such as wanda",
        ),
        ({"targets": ["layers"], "criteria": {"layers": "loss_change"}}, "loss_change doesn't score layers"),
        ({"targets": ["ffn_neurons"], "criteria": {"ffn_neurons": "greedy"}}, "greedy doesn't score ffn_neurons"),
        ({"targets": ["weights"], "criteria": {"weights": "movement"}}, "movement doesn't score weights"),
        ({"targets": ["weights"], "criteria": {"layers": "angular"}}, "criteria are given for layers, which"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(hf_prune.RecipeError, match=message):
        scan(zoo.build("llama"), labelled("llama"), **options)


def test_data_are_needed_and_a_loss():
    with pytest.raises(hf_prune.CalibrationError, match="the scan measures a loss"):
        scan(zoo.build("llama"), [])
    with pytest.raises(hf_prune.CalibrationError, match="gave no loss"):
        scan(zoo.build("bert"), labelled("llama"), targets=["layers"])
