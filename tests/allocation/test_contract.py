"""Every allocation on every target that it is for: the total, floors and ceilings, the ramp, what left stays out."""

import json
import math

import pytest
import torch

import hf_prune
from hf_prune.allocation.room import apportioned, fitted
from hf_prune.apply.masks import set_masks
from hf_prune.apply.shrink import remove_masked_
from hf_prune.plan import KeepMasks
from hf_prune.recipe.vocabulary import ALLOCATIONS, EVERY_TARGET
from hf_prune.structure import inspect_model
from tests import zoo
from tests.criteria.test_contract import labelled


SPARSITIES = (0.2, 0.4, 0.6, 0.8, 0.95)
FLOOR, CEILING = 0.2, 0.7
# options of those that need some, and the shares by glob that belong to a model; None is no allocation
GIVEN = {"sensitivity": {"file": "sensitivity.json"}}
BY_GLOB = {"*.layers.1*": 0.25, "*.layers.2*": 0.5}


def cases():
    for target in sorted(EVERY_TARGET):
        for name, entry in ALLOCATIONS.items():
            if target in entry.targets:
                for scope in sorted(entry.scopes - ({"output"} if target != "weights" else set())):
                    yield target, name, scope
        for scope in ("layer", "global"):
            yield target, "glob", scope
        yield target, None, "global"


CASES = [*cases()]


def step(target, name, scope, sparsity, **options):
    said = {"target": target, "sparsity": sparsity, "scope": scope, "criterion": "random", **options}
    if name == "glob":
        said["allocation"] = {"model.layers": 0.4} if target == "layers" else BY_GLOB
    elif name is not None:
        said["allocation"] = {"name": name, **GIVEN.get(name, {})}
    return said


def sites_of(model, target):
    structure = inspect_model(model)
    return structure.weights if target == "weights" else structure.of(target)


def n_units(site):
    return math.prod(site.shape) if hasattr(site, "shape") else site.n_units


def removed(plan, target, sites):
    """By site key, how many left."""
    masks = plan.masks.weights if target == "weights" else plan.masks.units
    return {s.key: int((~masks[s.name if target == "weights" else s.key]).sum()) for s in sites}


def write_curves(path, model, seed=0):
    """Made-up rising curves of every site."""
    generator = torch.Generator().manual_seed(seed)
    sites = [
        {
            "key": site.key,
            "sparsities": list(SPARSITIES),
            "losses": (1 + torch.rand(len(SPARSITIES), generator=generator).cumsum(0)).tolist(),
        }
        for site in (*inspect_model(model).sites, *inspect_model(model).weights)
    ]
    content = {"format": "hf_prune.sensitivity", "version": 1, "loss": 1.0, "sites": sites}
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture(autouse=True)
def curves(tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    target = request.node.callspec.params.get("target") if hasattr(request.node, "callspec") else None
    write_curves(tmp_path / "sensitivity.json", model_for("experts" if target == "experts" else None))


def plan(model, said, **options):
    return hf_prune.make_plan(model, {"version": 1, "prune": [said]}, calibration=labelled("llama"), **options)


def model_for(target):
    """With so many units a site that limits leave room."""
    if target == "layers":
        return zoo.build("llama", num_hidden_layers=10)
    heads = dict(num_attention_heads=16, num_key_value_heads=16, head_dim=4) if target == "attention_heads" else {}
    if target == "experts":
        return zoo.build("mixtral", num_hidden_layers=5, num_local_experts=16)
    return zoo.build("llama", num_hidden_layers=5, **heads)


@pytest.mark.parametrize("sparsity", [0.3, 0.55])
@pytest.mark.parametrize(("target", "name", "scope"), CASES)
def test_the_total_holds_and_every_limit_is_kept(target, name, scope, sparsity):
    model = model_for(target)
    sites = sites_of(model, target)
    if target == "layers" and name == "glob":
        sparsity = 0.4  # one stack: its share is the sparsity
    said = step(target, name, scope, sparsity, min_sparsity=FLOOR, max_sparsity=CEILING)
    gone = removed(plan(model, said), target, sites)
    total = sum(map(n_units, sites))
    rows = sum(site.shape[0] for site in sites) if scope == "output" else 1  # each output rounds by itself
    assert abs(sum(gone.values()) - sparsity * total) <= rows / 2
    for site in sites:
        n = n_units(site)
        slack = site.shape[0] / 2 if scope == "output" else 0.5
        assert FLOOR * n - slack <= gone[site.key] <= CEILING * n + (slack if scope == "output" else 0), site.name


@pytest.mark.parametrize(("target", "name", "scope"), CASES)
def test_the_ramp_only_takes_more_and_comes_to_the_total(target, name, scope):
    """With scores that change from update to update, so that an allocation by scores or data wants other shares each time."""
    model = model_for(target)
    sites = sites_of(model, target)
    previous, total = None, sum(map(n_units, sites))
    for number, progress in enumerate((0.2, 0.5, 0.8, 1.0)):
        said = step(target, name, scope, 0.4, min_sparsity=0.1, max_sparsity=0.8)
        said["criterion"] = {"name": "random", "seed": number}
        if name == "owl" and number:
            with torch.no_grad():  # the blocks' outliers change places
                model.model.layers[number - 1].mlp.down_proj.weight[:2] *= 50
        now = plan(model, said, progress=progress, previous=previous)
        if previous is not None:
            assert now.masks & previous.masks == now.masks, "something came back"
        asked, gone = progress * 0.4 * total, sum(removed(now, target, sites).values())
        rows = sum(site.shape[0] for site in sites) if scope == "output" else 1
        if scope != "output" or name is None:
            assert abs(gone - asked) <= rows / 2 + len(sites) * (name is None and scope != "global")
        previous = now


@pytest.mark.parametrize(("target", "name", "scope"), CASES)
def test_it_is_the_same_every_time_and_leaves_the_model_alone(target, name, scope):
    model = model_for(target)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    said = step(target, name, scope, 0.4)
    first, second = plan(model, said), plan(model, said)
    assert first.masks == second.masks and first.masks != KeepMasks()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("target", "name", "scope"), [case for case in CASES if case[0] in ("ffn_neurons", "attention_heads")]
)
@pytest.mark.parametrize("kind", ["parameters", "macs"])
def test_budgets_go_with_it(target, name, scope, kind):
    model = model_for(target)
    dense = sum(parameter.numel() for parameter in model.parameters())
    asked = {"ffn_neurons": 0.1, "attention_heads": 0.08}[target]
    said = step(target, name, scope, {kind: asked}, max_sparsity=0.9)
    if name == "glob":  # a quarter of one layer's, and the rest from the two others
        said["allocation"] = {"*.layers.1*": 0.25}
    found = plan(model, said)
    set_masks(model, found.masks)
    remove_masked_(model)
    if kind == "parameters":
        unit = {"ffn_neurons": 3 * 32, "attention_heads": 4 * 32 * 4}[target]
        after = sum(parameter.numel() for parameter in model.parameters())
        assert abs(dense - after - asked * dense) <= unit / 2
    assert not found.notes


@pytest.mark.parametrize("name", ["glob", "sensitivity", "owl", None])
def test_methods_that_choose_by_themselves_take_the_shares(name):
    """sparsegpt goes matrix by matrix: each loses what the allocation says, as under another criterion."""
    model = model_for("weights")
    sites = sites_of(model, "weights")
    said = step("weights", name, "layer", 0.5, max_sparsity={"*.layers.0.*": 0.35, "*": 0.9})
    if name is None:  # without an allocation no other site makes up for it
        said["max_sparsity"] = 0.9
    by_scores = removed(plan(model, said), "weights", sites)
    by_itself = removed(plan(model, said | {"criterion": "sparsegpt"}), "weights", sites)
    assert by_itself == by_scores
    assert (len({round(n / n_units(site), 2) for site, n in zip(sites, by_itself.values(), strict=True)}) > 1) == (
        name is not None
    )


@pytest.mark.parametrize("seed", range(30))
def test_fitted_and_apportioned(seed):
    generator = torch.Generator().manual_seed(seed)
    n = 1 + seed % 7
    wanted = (torch.rand(n, generator=generator) * 20).tolist()
    most = torch.randint(0, 25, (n,), generator=generator).tolist()
    least = [
        int(limit * share) for limit, share in zip(most, torch.rand(n, generator=generator).tolist(), strict=True)
    ]
    total = float(torch.rand(1, generator=generator)) * 1.2 * sum(wanted)
    found = fitted(wanted, least, most, total)
    reachable = min(max(total, sum(least)), sum(most))
    assert sum(found) == pytest.approx(reachable)
    factors = {round(f / w, 6) for f, w, low, high in zip(found, wanted, least, most, strict=True) if low < f < high}
    assert len(factors) <= 1, "those within their bounds have one factor"
    whole = apportioned(wanted, least, most)
    assert all(low <= count <= high for low, count, high in zip(least, whole, most, strict=True))
    assert sum(whole) == min(max(round(sum(wanted)), sum(least)), sum(most))
    exact = fitted(wanted, least, most, round(sum(wanted)))
    assert all(abs(count - value) < 1 + 1e-6 for count, value in zip(whole, exact, strict=True))
