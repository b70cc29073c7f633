"""Every criterion on units that never fire, on numbers that are not finite, on too little data: an error or sound numbers."""

import pytest
import torch

from hf_prune import apply_, make_plan
from hf_prune.errors import CalibrationError
from hf_prune.recipe.vocabulary import CRITERIA
from hf_prune.structure import inspect_model
from tests import zoo
from tests.criteria.test_contract import CASES, OPTIONS, labelled, trained


# what nobody routes to is with the tests of experts
PAIRS = [*dict.fromkeys((criterion, target) for criterion, target, _ in CASES if target != "experts")]
# those that look at nothing but numbers of their own
BLIND = {"random", "movement", "soft_movement"}


def recipe(criterion, target):
    amount = {"sparsity": 0.5}
    if CRITERIA[criterion].by_threshold:
        amount = {"threshold": {"rule": "absolute", "value": 0.5}}
    named = {"name": criterion, **OPTIONS.get(criterion, {})}
    return {"version": 1, "prune": [{"target": target, "criterion": named, **amount}]}


def planned(model, criterion, target, batches):
    structure = inspect_model(model)
    movement = trained([*structure.weights, *structure]).movement
    return make_plan(model, recipe(criterion, target), calibration=batches, movement=movement)


def require_sound(model, plan, n_there):
    """Half has left, and nothing that is not finite came into the model."""
    apply_(model, plan)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    (kept,) = plan.steps
    masks = {**kept.units, **kept.weights}
    assert masks and all(keep.any() for keep in masks.values())
    if plan.recipe["prune"][0].get("sparsity"):
        assert sum(int((~keep).sum()) for keep in masks.values()) == n_there


def n_leaving(model, target):
    """Half of each site, halves to even."""
    structure = inspect_model(model)
    if target == "weights":
        return sum(round(model.get_parameter(site.name).numel() / 2) for site in structure.weights)
    return sum(round(site.n_units / 2) for site in structure.of(target))


@torch.no_grad()
def silence_(model, *, all_of_them):
    """Units whose weights are zero, inputs and outputs: of each site one, or all of them, and with them a whole block."""
    structure = inspect_model(model)
    for site in (*structure.of("ffn_neurons"), *structure.of("attention_heads")):
        if all_of_them and "1" not in site.name:
            continue
        units = torch.arange(site.n_units) if all_of_them else torch.tensor([1])
        for piece in site.slices:
            tensor = getattr(model.get_submodule(piece.module), piece.tensor)
            tensor.index_fill_(piece.dim, piece.index(units), 0)


@pytest.mark.parametrize("all_of_them", [False, True], ids=["one", "a block"])
@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize(("criterion", "target"), PAIRS)
def test_units_that_never_fire(criterion, target, name, all_of_them):
    model = zoo.build(name)
    silence_(model, all_of_them=all_of_them)
    plan = planned(model, criterion, target, labelled(name))
    # of a combination another may be worth less; and the loss may be lower without what does something
    if target in ("ffn_neurons", "attention_heads") and criterion not in (*BLIND, "combined", "loss_change"):
        assert all_of_them or all(not keep[1] for keep in plan.masks.units.values()), "what does nothing leaves first"
    require_sound(model, plan, n_leaving(model, target))


@pytest.mark.parametrize(("criterion", "target"), PAIRS)
def test_one_sample_of_two_tokens(criterion, target):
    model = zoo.build("bert")  # all Gram matrices are singular: of rank 2, the pooler's of 1
    batch = {key: value[:1, :2] if value.dim() > 1 else value[:1] for key, value in labelled("bert")[0].items()}
    require_sound(model, planned(model, criterion, target, [batch]), n_leaving(model, target))


UPDATES = {
    "sparsegpt": {"target": "weights", "sparsity": 0.5, "criterion": "sparsegpt"},
    "2:4": {"target": "weights", "pattern": "2:4", "criterion": "sparsegpt"},
    "dense target": {"target": "weights", "sparsity": 0.5, "criterion": {"name": "sparsegpt", "dense_target": True}},
    "neurons": {"target": "ffn_neurons", "sparsity": 0.5, "compensation": "least_squares"},
    "heads": {"target": "attention_heads", "sparsity": 0.5, "compensation": {"name": "bias", "add": True}},
    "layers": {"target": "layers", "remove": [1], "compensation": "linear"},
}


@pytest.mark.parametrize("n_tokens", [1, 2, 64])
@pytest.mark.parametrize("all_of_them", [None, False, True], ids=["none", "one", "a block"])
@pytest.mark.parametrize("update", UPDATES)
def test_new_values_where_gram_matrices_are_singular(update, all_of_them, n_tokens):
    model = zoo.build("llama")
    if all_of_them is not None:
        silence_(model, all_of_them=all_of_them)
    batches = labelled("llama", n_batches=max(1, n_tokens // 16))
    if n_tokens < 16:
        batches = [{key: value[:1, :n_tokens] for key, value in batches[0].items()}]
    plan = make_plan(model, {"version": 1, "prune": [UPDATES[update]]}, calibration=batches)
    assert plan.replacements and all(torch.isfinite(value).all() for value in plan.replacements.values())
    apply_(model, plan)
    with torch.no_grad():
        assert all(torch.isfinite(model(**batch).logits).all() for batch in batches)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize(("criterion", "target"), PAIRS)
def test_weights_that_are_not_finite(criterion, target, value):
    model = zoo.build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 2] = value
    if criterion in BLIND or (
        criterion in ("l1", "l2") and target == "attention_heads"
    ):  # of which no weight is broken
        plan = planned(model, criterion, target, labelled("llama"))
        assert plan.masks and not plan.replacements
        return
    with pytest.raises(CalibrationError, match=r"not finite|is inf|is nan") as error:
        planned(model, criterion, target, labelled("llama"))
    assert "bfloat16 or float32" in str(error.value)


@pytest.mark.parametrize(("criterion", "target"), PAIRS)
def test_a_loss_that_is_infinite(criterion, target):
    model = zoo.build("bert")
    with torch.no_grad():
        model.classifier.weight[0] = float("inf")
    batches = labelled("bert")
    if criterion in ("gradient", "taylor", "fisher", "loss_change", "combined"):
        with pytest.raises(CalibrationError, match=r"the loss of calibration batch 0 is (inf|nan)"):
            planned(model, criterion, target, batches)
    else:  # nothing that it looks at is broken
        assert planned(model, criterion, target, batches).masks
