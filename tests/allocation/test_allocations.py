"""Each allocation against a loop or a case by hand; what it refuses."""

import itertools
import json

import pytest
import torch

import hf_prune
from hf_prune.allocation.kind import kind_of
from hf_prune.allocation.room import Look, Room
from hf_prune.allocation.sensitivity import BySensitivity, lower_hull
from hf_prune.calibration import collect
from hf_prune.structure import inspect_model
from hf_prune.structure.sites import Site
from tests import zoo
from tests.criteria.test_contract import labelled


def plan(model, *steps, batches=None):
    return hf_prune.make_plan(model, {"version": 1, "prune": list(steps)}, calibration=batches)


def shares(found, target="weights"):
    masks = found.masks.weights if target == "weights" else found.masks.units
    return {key: float((~keep).double().mean()) for key, keep in masks.items()}


# ----------------------------------------------------------------------------------------------------------- owl


def test_owl_follows_the_share_of_outliers():
    """D by a plain loop over each block's entries; sparsities linear in it, within S ± λ, with the mean S."""
    model, batches = zoo.build("llama", num_hidden_layers=4), labelled("llama")
    with torch.no_grad():
        for layer, factor in ((1, 6.0), (2, 20.0)):
            model.model.layers[layer].mlp.up_proj.weight[:3] *= factor
    sites = inspect_model(model).weights
    squared = collect(model, batches, frozenset({"squared_inputs"}), sites).squared_inputs
    outliers, multiple, spread, sparsity = [], 3.0, 0.1, 0.5
    for layer in range(4):
        entries = []
        for site in sites:
            if f".layers.{layer}." in site.module:
                norms = squared[site.module].sqrt().tolist()
                for row in model.get_parameter(site.name).tolist():
                    entries += [abs(w) * norm for w, norm in zip(row, norms, strict=True)]
        mean = sum(entries) / len(entries)
        outliers.append(sum(a > multiple * mean for a in entries) / len(entries))
    middle = sum(outliers) / 4
    widest = max(abs(d - middle) for d in outliers)
    expected = [sparsity + spread * (middle - d) / widest for d in outliers]
    assert max(expected) - min(expected) > spread, "a case in which nothing differs"
    step = {"target": "weights", "sparsity": sparsity, "criterion": "wanda", "scope": "layer"}
    step["allocation"] = {"name": "owl", "multiple": multiple, "spread": spread}
    found = shares(plan(model, step, batches=batches))
    for name, share in found.items():
        layer = int(name.split(".")[2])
        n = model.get_parameter(name).numel()
        assert abs(share - expected[layer]) <= 1 / n, name


def test_owl_of_blocks_alike_is_the_sparsity_everywhere():
    model = zoo.build("llama")
    for layer in model.model.layers[1:]:
        layer.load_state_dict(model.model.layers[0].state_dict())
    with torch.no_grad():  # each block gets the same input
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.zero_()
            layer.self_attn.o_proj.weight.zero_()
    step = {"target": "weights", "sparsity": 0.5, "scope": "layer", "allocation": "owl"}
    found = shares(plan(model, step, batches=labelled("llama")))
    assert set(found.values()) == {0.5}


@pytest.mark.parametrize("name", ["bert", "gpt2", "falcon-new"])
@pytest.mark.parametrize("pattern", ["unstructured", {"block": [4, 4]}])
def test_owl_holds_the_total_on_any_layout(name, pattern):
    """Conv1D, fused projections, a pooler outside the blocks."""
    model = zoo.build(name)
    step = {"target": "weights", "sparsity": 0.37, "scope": "layer", "pattern": pattern}
    step["allocation"] = {"name": "owl", "multiple": 2, "spread": 0.2}
    masks = plan(model, step, batches=labelled("bert" if name == "bert" else "llama")).masks.weights
    gone, total = sum(int((~keep).sum()) for keep in masks.values()), sum(keep.numel() for keep in masks.values())
    assert abs(gone - 0.37 * total) <= (0.5 if pattern == "unstructured" else 8)
    lost = {round(float((~keep).double().mean()), 2) for keep in masks.values()}
    assert len(lost) > 1 and max(lost) <= 0.57 + 0.01 and min(lost) >= 0.17 - 0.01


def test_owl_needs_data_and_options_that_can_be():
    step = {"target": "weights", "sparsity": 0.5, "allocation": "owl"}
    with pytest.raises(hf_prune.CalibrationError, match="allocation 'owl' looks at data"):
        plan(zoo.build("llama"), step)
    for name, value in (("multiple", 0), ("spread", 1.0), ("spread", -0.1)):
        with pytest.raises(hf_prune.RecipeError, match=f"{name} of allocation owl is {value}; expected a number"):
            plan(zoo.build("llama"), step | {"allocation": {"name": "owl", name: value}}, batches=labelled("llama"))


# ---------------------------------------------------------------------------------------------------------- kind


@pytest.mark.parametrize(
    ("name", "target", "expected"),
    [
        ("bart", "ffn_neurons", {"encoder.layers.*", "decoder.layers.*"}),
        (
            "t5",
            "attention_heads",
            {
                "encoder.block.*.layer.*.SelfAttention",
                "decoder.block.*.layer.*.SelfAttention",
                "decoder.block.*.layer.*.EncDecAttention",
            },
        ),
        ("llama", "weights", {"model.layers.*.self_attn", "model.layers.*.mlp"}),
    ],
)
def test_kinds(name, target, expected):
    structure = inspect_model(zoo.build(name))
    sites = structure.weights if target == "weights" else structure.of(target)
    assert {kind_of(site, structure) for site in sites} == expected


def test_no_kind_starves_another():
    """The decoder's scores are a hundred times those of the encoder: under scope global alone the encoder loses all."""
    model = zoo.build("bart", decoder_ffn_dim=48)
    with torch.no_grad():
        for layer in model.decoder.layers:
            layer.fc1.weight *= 100
            layer.fc2.weight *= 100
    step = {"target": "ffn_neurons", "sparsity": 0.5, "scope": "global", "normalize": "none"}

    def lost(found):
        return {
            stack: sum(int((~keep).sum()) for key, keep in found.masks.units.items() if f":{stack}." in key)
            for stack in ("encoder", "decoder")
        }

    assert lost(plan(model, step))["decoder"] == 0
    assert lost(plan(model, step | {"allocation": "kind"})) == {"encoder": 72, "decoder": 48}


@pytest.mark.parametrize("criterion", ["wanda", "ria"])
def test_a_criterion_s_own_scale_does_not_decide_between_matrices(criterion):
    """Under scope global: what doesn't change what the model computes doesn't change how much leaves where.

    The values a hundred times as large, and the projection that reads them a hundredth: the same function, other scores.
    """
    model, scaled, batches = zoo.build("llama"), zoo.build("llama"), labelled("llama")
    with torch.no_grad():
        for layer in scaled.model.layers[:2]:
            layer.self_attn.v_proj.weight *= 128
            layer.self_attn.o_proj.weight /= 128
    step = {"target": "weights", "sparsity": 0.5, "scope": "global", "criterion": criterion}
    first, second, raw = (
        plan(each, step | {"normalize": how}, batches=batches).masks.weights
        for each, how in ((model, "auto"), (scaled, "auto"), (scaled, "none"))
    )
    n_entries = sum(keep.numel() for keep in first.values())
    assert sum(int((first[name] != second[name]).sum()) for name in first) <= 1e-3 * n_entries
    assert sum(int((first[name] != raw[name]).sum()) for name in first) > 0.01 * n_entries


def test_magnitudes_of_weights_compare_raw():
    model = zoo.build("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight *= 0.3
    found = plan(model, {"target": "weights", "sparsity": 0.3, "scope": "global"}).masks.weights
    everything = torch.cat([model.get_parameter(name).abs().reshape(-1) for name in found])
    cut = everything.sort().values[round(0.3 * everything.numel())]
    assert all(torch.equal(keep, model.get_parameter(name).abs() >= cut) for name, keep in found.items())


# ---------------------------------------------------------------------------------------------------------- globs


def test_what_no_glob_names_takes_the_rest():
    model = zoo.build("bert")
    step = {"target": "ffn_neurons", "sparsity": 0.5, "allocation": {"*.layer.0": 0.25, "*": 0.5, "*.layer.2": 0.9}}
    with pytest.raises(
        hf_prune.RecipeError, match=r"names every site, and its shares come to 0.4167 .* say sparsity: 0.4167"
    ):
        plan(model, step)
    step["allocation"] = {"*.layer.0": 0.25, "*.layer.[01]": 0.5}  # the first that fits counts
    assert [*shares(plan(model, step), "units").values()] == [0.25, 0.5, 0.75]
    step["allocation"] = {"*.layer.0": 0.0}
    assert [*shares(plan(model, step), "units").values()] == [0.0, 0.75, 0.75]


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (
            {"allocation": {"*.layr.0": 0.1}},
            r"'\*.layr.0' matches no ffn_neurons site; one is named bert.encoder.layer.0",
        ),
        ({"max_sparsity": {"*.layer.9": 0.1}}, r"'\*.layer.9' matches no ffn_neurons site"),
        ({"min_sparsity": {"nothing": 0.1}}, "'nothing' matches no ffn_neurons site"),
        ({"allocation": {"*.layer.0": 0.9, "*.layer.1": 0.9}}, "leaves -30.0% to take from the 1 sites"),
        ({"allocation": {"*.layer.0": 0.0, "*.layer.1": 0.0}}, "leaves 150.0% to take from the 1 sites"),
        (
            {"allocation": {"*.layer.0": 0.9}, "max_sparsity": 0.6},
            "allocation takes 0.9 of bert.encoder.layer.0, whose limits are 0 to 0.5833",
        ),
        ({"min_sparsity": 0.6}, "min_sparsity 0.6 of bert.encoder.layer.0 is more than the 0.5 that leaves each site"),
        ({"min_sparsity": 0.6, "scope": "global"}, "min_sparsity comes to 60.0% of the ffn_neurons, but 50.0% are to"),
        (
            {"min_sparsity": 0.4, "max_sparsity": 0.3, "scope": "global"},
            "min_sparsity 0.4 .* is above its max_sparsity 0.3",
        ),
    ],
)
def test_what_can_not_be_is_refused(step, message):
    with pytest.raises(hf_prune.RecipeError, match=message):
        plan(zoo.build("bert"), {"target": "ffn_neurons", "sparsity": 0.5, **step})


def test_floors_and_ceilings_of_weights():
    model = zoo.build("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight *= 0.01
        model.model.layers[0].mlp.down_proj.weight *= 100
    step = {"target": "weights", "sparsity": 0.4, "scope": "global", "min_sparsity": 0.25}
    step["max_sparsity"] = {"*.layers.0.mlp.up_proj": 0.5}
    found = shares(plan(model, step))
    assert found["model.layers.0.mlp.up_proj.weight"] == 0.5
    assert found["model.layers.0.mlp.down_proj.weight"] == 0.25
    total = sum(model.get_parameter(name).numel() for name in found)
    assert abs(sum(share * model.get_parameter(name).numel() for name, share in found.items()) - 0.4 * total) <= 0.5


# ---------------------------------------------------------------------------------------------------- sensitivity


GRID = (0.25, 0.5, 0.75)


def write(path, curves, dense=1.0, **changes):
    sites = [
        {"key": f"ffn_neurons:{name}", "sparsities": list(GRID), "losses": losses} for name, losses in curves.items()
    ]
    path.write_text(
        json.dumps({"format": "hf_prune.sensitivity", "version": 1, "loss": dense, "sites": sites, **changes}),
        encoding="utf-8",
    )


def test_the_lower_hull():
    assert lower_hull([(0, 0), (1, 3), (2, 1), (3, 4), (4, 4)]) == [(0, 0), (2, 1), (4, 4)]
    assert lower_hull([(0, 1), (1, 0), (2, 5)]) == [(0, 1), (1, 0), (2, 5)]


@pytest.mark.parametrize("seed", range(12))
def test_the_summed_loss_is_the_least_of_all(seed, tmp_path):
    """Against every combination of grid points of convex curves that comes to the total."""
    generator = torch.Generator().manual_seed(seed)
    sites = [Site(f"block.{n}", "ffn_neurons", 8) for n in range(3)]
    curves = {}
    for site in sites:
        rises = torch.rand(3, generator=generator).sort().values.cumsum(0)
        curves[site.name] = (1 + rises).tolist()
    write(tmp_path / "curves.json", curves)
    sizes = {site.key: 8.0 for site in sites}
    total = float(torch.randint(1, 9, (), generator=generator)) * 2.0
    room = Room(sites, sizes, dict.fromkeys(sizes, 0.0), dict.fromkeys(sizes, 7.0), total, dict.fromkeys(sizes, 1.0))
    pools = BySensitivity(str(tmp_path / "curves.json")).pools(room, Look(None, None, {}))

    def loss(name, share):
        points = [(0.0, 1.0), *zip(GRID, curves[name], strict=True)]
        for (x0, y0), (x1, y1) in itertools.pairwise(points):
            if x0 <= share <= x1 + 1e-12:
                return y0 + (y1 - y0) * (share - x0) / (x1 - x0)
        raise AssertionError(share)

    found = sum(loss(pool.sites[0].name, pool.amount / 8) for pool in pools)
    assert sum(pool.amount for pool in pools) == pytest.approx(total)
    best = min(
        sum(loss(site.name, share) for site, share in zip(sites, combination, strict=True))
        for combination in itertools.product((0.0, *GRID), repeat=3)
        if abs(sum(combination) * 8 - total) < 1e-9
    )
    assert found == pytest.approx(best)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (None, "there is no curves.json; `hf-prune sensitivity MODEL --json curves.json` writes it"),
        ({"format": "x"}, "expected the file that `hf-prune sensitivity --json` writes"),
        ({"version": 2}, "its version is 2; this reads 1"),
        ({"loss": float("nan")}, "expected finite losses"),
        ({"sites": []}, "has no figures for bert.encoder.layer.0; scan the target \\(ffn_neurons\\)"),
        ({"sites": [{"target": "ffn_neurons"}]}, "can't be read"),
        ({}, "75.0% can leave, and 80.0% is asked for; scan up to a higher sparsity"),
    ],
)
def test_files_that_do_not_fit_are_refused(changes, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = zoo.build("bert")
    if changes is not None:
        curves = {site.name: [1.1, 1.2, 1.3] for site in inspect_model(model).of("ffn_neurons")}
        write(tmp_path / "curves.json", curves, **changes)
    step = {"target": "ffn_neurons", "sparsity": 0.8, "allocation": {"name": "sensitivity", "file": "curves.json"}}
    with pytest.raises(hf_prune.RecipeError, match=message):
        plan(model, step)
