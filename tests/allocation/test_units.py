"""Which heads, neurons and layers leave, against plain loops over random cases."""

import fnmatch
import itertools
import random

import pytest
import torch

import hf_prune
from hf_prune.allocation import choose_units
from hf_prune.recipe import Recipe
from hf_prune.structure import inspect_model
from hf_prune.structure.sites import Site
from tests import zoo
from tests.allocation.test_weights import half_to_even, mean, std


def step(target="ffn_neurons", **options):
    return Recipe.from_dict({"version": 1, "prune": [{"target": target, **options}]}).prune[0]


def case(seed, sizes=(7, 12, 5), ties=False, earlier=0.2):
    generator = torch.Generator().manual_seed(seed)
    sites = [Site(f"block.{n}", "ffn_neurons", size) for n, size in enumerate(sizes)]
    scores, eligible = {}, {}
    for site in sites:
        score = torch.rand(site.n_units, generator=generator)
        scores[site.key] = (score * 3).round() if ties else score
        there = torch.rand(site.n_units, generator=generator) >= earlier
        there[seed % site.n_units] = True
        eligible[site.key] = there
    return sites, scores, eligible


def there_of(site, scores, eligible, divide=1.0):
    """[(score, (site, unit))] of what is there."""
    values = zip(scores[site.key].tolist(), eligible[site.key].tolist(), strict=True)
    return [(score / divide, (site.name, unit)) for unit, (score, there) in enumerate(values) if there]


def removed(choice, sites):
    return {(site.name, unit) for site in sites for unit in torch.nonzero(~choice.keep[site.key]).flatten().tolist()}


def greedy(entries, n, limits):
    """The n lowest, by score then by place, none of a site beyond its limit."""
    out, taken = set(), dict.fromkeys(limits, 0)
    for _, (name, unit) in sorted(entries, key=lambda entry: entry[0]):
        if len(out) < n and taken[name] < limits[name]:
            out.add((name, unit))
            taken[name] += 1
    return out


def limits_of(sites, eligible, min_keep, max_sparsity):
    counts = {site.name: int(eligible[site.key].sum()) for site in sites}
    return {name: max(0, min(n - max(1, min_keep), int(max_sparsity * n + 1e-9))) for name, n in counts.items()}


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("normalize", ["none", "mean", "max"])
def test_sparsity(scope, normalize, ties):
    for seed in range(60):
        rng = random.Random(seed)
        sparsity, progress = rng.choice([0.0, 0.25, 0.5, 0.77, 0.99]), rng.choice([1.0, 0.5, 0.3])
        min_keep, max_sparsity = rng.choice([1, 3]), rng.choice([1.0, 0.6])
        sites, scores, eligible = case(seed, ties=ties)
        choice = choose_units(
            step(sparsity=sparsity, scope=scope, min_keep=min_keep, max_sparsity=max_sparsity, normalize=normalize),
            sites, scores, eligible, {}, progress=progress,
        )  # fmt: skip
        limits = limits_of(sites, eligible, min_keep, max_sparsity)
        entries = []
        for site in sites:
            values = [score for score, _ in there_of(site, scores, eligible)]
            scale = {"none": 1.0, "mean": mean(values), "max": max(values)}[normalize] or 1.0
            divided = {
                site.key: torch.tensor([float(torch.tensor(s, dtype=torch.float64) / scale) for s in scores[site.key]])
            }
            entries.append(there_of(site, divided, eligible))
        pools = [list(itertools.chain(*entries))] if scope == "global" else entries
        expected = set()
        for pool in pools:
            asked = half_to_even(progress * sparsity * len(pool))
            out = greedy(pool, asked, limits)
            assert len(out) == asked or any("could" in note for note in choice.notes), "short of it, and silent"
            expected |= out
        assert removed(choice, sites) == expected
        for site in sites:
            assert int((choice.keep[site.key] & eligible[site.key]).sum()) >= 1, "a site is emptied"
            assert choice.keep[site.key][~eligible[site.key]].all(), "what an earlier step removed is its own affair"


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_what_an_earlier_update_removed_stays_out_first_of_all(scope):
    for seed in range(40):
        sites, scores, eligible = case(seed)
        asked = step(sparsity=0.6, scope=scope)
        first = choose_units(asked, sites, scores, eligible, {}, progress=0.5)
        _, others, _ = case(seed + 1000)
        gone = {key: ~keep for key, keep in first.keep.items()}
        second = choose_units(asked, sites, others, eligible, gone, progress=1.0)
        assert removed(first, sites) <= removed(second, sites)
        counts = [int(eligible[site.key].sum()) for site in sites]
        if scope == "global" and not second.notes:
            assert len(removed(second, sites)) == half_to_even(0.6 * sum(counts))


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize(
    ("rule", "value", "cut"),
    [
        ("absolute", 0.4, lambda values: 0.4),
        ("relative_to_max", 0.6, lambda values: 0.6 * max(values)),
        ("mean_minus_std", 0.7, lambda values: mean(values) - 0.7 * std(values)),
    ],
)
def test_thresholds_look_at_raw_scores(rule, value, cut, scope):
    for seed in range(40):
        sites, scores, eligible = case(seed)
        scores["ffn_neurons:block.1"] *= 3  # sites that differ in scale
        choice = choose_units(
            step(threshold={"rule": rule, "value": value}, scope=scope), sites, scores, eligible, {}, progress=1.0
        )
        entries = [there_of(site, scores, eligible) for site in sites]
        pools = [list(itertools.chain(*entries))] if scope == "global" else entries
        limits = limits_of(sites, eligible, 1, 1.0)
        expected = set()
        for pool in pools:
            below = [entry for entry in pool if entry[0] < cut([score for score, _ in pool])]
            expected |= greedy(below, len(below), limits)
            if not below:
                assert any("removes nothing" in note for note in choice.notes)
        assert removed(choice, sites) == expected


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_kept_sizes_are_multiples_or_whole_and_the_total_stays_near(scope):
    for seed in range(40):
        sites, scores, eligible = case(seed, sizes=(24, 32, 40), earlier=0.0)
        choice = choose_units(step(sparsity=0.5, scope=scope, round_to=8), sites, scores, eligible, {}, progress=1.0)
        kept = [int(choice.keep[site.key].sum()) for site in sites]
        assert all(n % 8 == 0 and n >= 8 for n in kept)
        assert abs(sum(kept) - 48) <= 4 * (1 if scope == "global" else 3)


def test_rounding_that_can_not_be_met_says_so():
    sites, scores, eligible = case(0, sizes=(5, 24), earlier=0.0)
    choice = choose_units(step(sparsity=0.5, round_to=8), sites, scores, eligible, {}, progress=1.0)
    assert [int(choice.keep[site.key].sum()) for site in sites] in ([5, 8], [5, 16])
    assert any("block.0" in note and "round_to 8" in note for note in choice.notes)


def test_uniform_takes_the_nearest_size_that_the_config_says():
    sites, scores, eligible = case(0, sizes=(8, 8, 8), earlier=0.0)
    asked = step(sparsity=0.4, uniform=True)
    choice = choose_units(asked, sites, scores, eligible, {}, progress=1.0, allowed_sizes=lambda _: [1, 2, 4, 8])
    assert [int(choice.keep[site.key].sum()) for site in sites] == [4, 4, 4]  # 4.8 wanted
    assert any("4.8 of 8" in note for note in choice.notes)
    with pytest.raises(hf_prune.RecipeError, match=r"allows \[8\]"):
        choose_units(asked, sites, scores, eligible, {}, progress=1.0, allowed_sizes=lambda _: [8])


def sizes(model, *steps):
    plan = hf_prune.make_plan(model, {"version": 1, "prune": list(steps)})
    return {key: int(keep.sum()) for key, keep in plan.masks.units.items()}, plan


@pytest.mark.parametrize("target", ["ffn_neurons", "attention_heads"])
def test_uniform_passes_over_the_layers_that_leave(target):
    model = zoo.build("llama")
    kept, _ = sizes(model, {"target": "layers", "remove": [1]}, {"target": target, "sparsity": 0.5, "uniform": True})
    n_units = {"ffn_neurons": 24, "attention_heads": 1}[target]
    assert sorted(kept.values()) == sorted([2, n_units, n_units])
    report = hf_prune.prune_(
        model,
        {
            "version": 1,
            "prune": [
                {"target": "layers", "remove": [1]},
                {"target": target, "sparsity": 0.5, "uniform": True},
            ],
        },
    )
    assert report.to_dict()["checkpoint"]["loads_with"] == "transformers"


def test_uniform_makes_uneven_sites_even_again():
    kept, plan = sizes(
        zoo.build("llama"),
        {"target": "ffn_neurons", "sparsity": 0.2, "scope": "global"},
        {"target": "ffn_neurons", "sparsity": 0.5, "uniform": True},
    )
    there = sum(int(keep.sum()) for keep in plan.steps[0].units.values()) / 3
    assert len(set(kept.values())) == 1
    assert abs(next(iter(kept.values())) - there / 2) <= 0.5


@pytest.mark.parametrize(
    ("name", "changes", "include", "expected"),
    [
        ("bart", {}, "*", {24, 20}),  # two fields of two sizes
        ("bart", {"decoder_ffn_dim": 48}, "*", {24}),  # two fields of one size
        ("bart", {"decoder_ffn_dim": 48}, "encoder.*", {24}),  # one of them alone
        ("t5", {}, "*", {24}),  # one field for both stacks
        ("t5", {}, "encoder.*", None),  # which can't be said of one
        ("clip", {}, "*", {24}),
        ("bloom", {}, "*", None),  # 4 * hidden_size, in code
    ],
    ids=str,
)
def test_uniform_where_sites_share_config_fields(name, changes, include, expected):
    model = zoo.build(name, **changes)
    wanted = {"target": "ffn_neurons", "sparsity": 0.5, "uniform": True, "include": [include]}
    if expected is None:
        with pytest.raises(hf_prune.RecipeError, match=r"can't say a smaller equal size .* it allows \[\d+\]"):
            sizes(model, wanted)
        return
    assert set(sizes(model, wanted)[0].values()) == expected
    report = hf_prune.prune_(model, {"version": 1, "prune": [wanted]})
    assert report.to_dict()["checkpoint"]["loads_with"] == "transformers"


def test_include_and_exclude_are_globs_on_module_names():
    model = zoo.build("llama")
    names = [site.name for site in inspect_model(model).of("ffn_neurons")]
    for include, exclude in [(["*"], ["*.1.*"]), (["model.layers.[02].*"], []), ([], ["model.layers.2.mlp"])]:
        plan = hf_prune.make_plan(
            model,
            {
                "version": 1,
                "prune": [{"target": "ffn_neurons", "sparsity": 0.5, "include": include, "exclude": exclude}],
            },
        )
        wanted = {
            name
            for name in names
            if (not include or any(fnmatch.fnmatchcase(name, glob) for glob in include))
            and not any(fnmatch.fnmatchcase(name, glob) for glob in exclude)
        }
        assert {key.partition(":")[2] for key, keep in plan.masks.units.items() if not keep.all()} == wanted


def test_what_is_named_leaves_and_nothing_else():
    model = zoo.build("t5")
    _, plan = sizes(
        model,
        {"target": "layers", "remove": {"encoder.block": [1], "decoder.*": [0]}},
        {"target": "attention_heads", "remove": {"*SelfAttention": [0, 3]}},
        {"target": "ffn_neurons", "remove": {"encoder.block.2.*": [5]}},
    )
    gone = {key: torch.nonzero(~keep).flatten().tolist() for key, keep in plan.masks.units.items() if not keep.all()}
    assert gone == {
        "layers:encoder.block": [1],
        "layers:decoder.block": [0],
        "attention_heads:encoder.block.*.layer.0.SelfAttention": [0, 3],
        "attention_heads:decoder.block.*.layer.0.SelfAttention": [0, 3],
        "ffn_neurons:encoder.block.2.layer.1.DenseReluDense": [5],
    }


@pytest.mark.parametrize("target", ["ffn_neurons", "attention_heads", "layers"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_no_step_empties_a_site(target, scope):
    model = zoo.build("bert")
    step = {"target": target, "threshold": {"rule": "absolute", "value": 1e9}, "scope": scope}
    kept, plan = sizes(model, step, step)
    assert set(kept.values()) == {1}
    assert plan.notes, "less has left than the threshold says: the plan says so"
