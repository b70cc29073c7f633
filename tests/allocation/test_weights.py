"""Which single weights leave, against plain loops."""

import itertools

import pytest
import torch
import transformers

import hf_prune
from hf_prune.allocation import choose_weights
from hf_prune.apply.masks import masks_of, set_masks
from hf_prune.apply.shrink import remove_masked_
from hf_prune.recipe import Recipe
from hf_prune.structure.sites import WeightSite
from tests import zoo


def step(**options):
    return Recipe.from_dict({"version": 1, "prune": [{"target": "weights", **options}]}).prune[0]


def linear(name, rows, columns):
    return WeightSite(f"{name}.weight", name, (rows, columns), 1)


def conv1d(name, columns, rows):
    return WeightSite(f"{name}.weight", name, (columns, rows), 0)


def tensors(sites, seed, ties=False):
    generator = torch.Generator().manual_seed(seed)
    scores, eligible = {}, {}
    for site in sites:
        score = torch.rand(site.shape, generator=generator)
        scores[site.name] = (score * 4).round() if ties else score
        eligible[site.name] = torch.rand(site.shape, generator=generator) > 0.2
    return scores, eligible


def half_to_even(x):
    whole = int(x)
    if x - whole == 0.5:
        return whole + whole % 2
    return int(x + 0.5)


def lowest_entries(entries, n):
    """The n lowest of [(score, place)]: by score, then by place."""
    return {place for _, place in sorted(entries, key=lambda entry: entry[0])[:n]}


def places(site, scores, eligible):
    """[(score, (name, row, column))] in reading order of the matrix (d_out, d_in)."""
    score, there = scores[site.name], eligible[site.name]
    if site.reduction_dim == 0:
        score, there = score.t(), there.t()
    rows, columns = score.shape
    return [
        (float(score[r, c]), (site.name, r, c)) for r in range(rows) for c in range(columns) if there[r, c]
    ]  # fmt: skip


def removed(choice, sites):
    found = set()
    for site in sites:
        keep = choice.keep[site.name]
        keep = keep.t() if site.reduction_dim == 0 else keep
        found |= {(site.name, *place) for place in torch.nonzero(~keep).tolist()}
    return found


SITES = [linear("a", 6, 8), conv1d("b", 8, 4), linear("c", 5, 4)]


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("scope", ["output", "layer", "global"])
@pytest.mark.parametrize(("sparsity", "progress"), [(0.5, 1.0), (0.5, 0.3), (0.31, 1.0), (0.0, 1.0), (0.8, 1.0)])
def test_unstructured(scope, sparsity, progress, ties):
    for seed in range(3):
        scores, eligible = tensors(SITES, seed, ties)
        choice = choose_weights(step(sparsity=sparsity, scope=scope), SITES, scores, eligible, {}, progress=progress)
        everything = [places(site, scores, eligible) for site in SITES]
        if scope == "global":
            pools = [list(itertools.chain(*everything))]
        elif scope == "layer":
            pools = everything
        else:
            pools = [
                list(row)
                for entries in everything
                for _, row in itertools.groupby(entries, key=lambda entry: entry[1][:2])
            ]
        expected = set()
        for pool in pools:
            expected |= lowest_entries(pool, half_to_even(progress * sparsity * len(pool)))
        assert removed(choice, SITES) == expected


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:4", "1:2"])
def test_n_of_every_m_along_the_inputs(pattern):
    n, m = map(int, pattern.split(":"))
    sites = [linear("a", 6, 8), conv1d("b", 8, 4)]
    scores, eligible = tensors(sites, 0, ties=True)
    choice = choose_weights(step(pattern=pattern), sites, scores, eligible, {}, progress=1.0)
    expected = set()
    for site in sites:
        rows, columns = (6, 8) if site.reduction_dim == 1 else (4, 8)
        there = {place: score for score, place in places(site, scores, eligible)}
        for r, start in itertools.product(range(rows), range(0, columns, m)):
            group = [(there[place], place) for c in range(m) if (place := (site.name, r, start + c)) in there]
            n_zero = m - len(group)  # earlier steps removed those: they count among the zeros
            expected |= lowest_entries(group, max(0, m - n - n_zero))
    assert removed(choice, sites) == expected


def test_n_of_m_ramps_by_groups_and_never_takes_more_of_a_group():
    """Scores that change from update to update, as gradients do: a group still keeps its N."""
    sites = [linear("a", 6, 8)]
    gone, before = {}, 0
    for number, progress in enumerate((0.25, 0.5, 1.0)):
        scores = {"a.weight": torch.rand(6, 8, generator=torch.Generator().manual_seed(number))}
        everything = {"a.weight": torch.ones(6, 8, dtype=torch.bool)}
        choice = choose_weights(step(pattern="2:4"), sites, scores, everything, gone, progress=progress)
        zeros = (~choice.keep["a.weight"]).reshape(6, 2, 4).sum(-1)
        assert set(zeros.flatten().tolist()) <= {0, 2}
        assert int((zeros == 2).sum()) == half_to_even(progress * 12)
        assert int((~choice.keep["a.weight"]).sum()) >= before
        gone, before = {"a.weight": ~choice.keep["a.weight"]}, int((~choice.keep["a.weight"]).sum())


@pytest.mark.parametrize("site", [linear("a", 6, 8), conv1d("a", 8, 6)], ids=["linear", "conv1d"])
def test_blocks_are_outputs_by_inputs(site):
    scores, eligible = tensors([site], 1)
    choice = choose_weights(step(pattern={"block": [2, 4]}, sparsity=0.5), [site], scores, eligible, {}, progress=1.0)
    there = {place: score for score, place in places(site, scores, eligible)}
    blocks = []
    for top, start in itertools.product(range(0, 6, 2), range(0, 8, 4)):
        members = [
            place for r in range(2) for c in range(4) if (place := ("a.weight", top + r, start + c)) in there
        ]  # fmt: skip
        blocks.append((sum(there[place] for place in members) / len(members), tuple(members)))
    expected = set(itertools.chain(*lowest_entries(blocks, 3)))
    assert removed(choice, [site]) == expected


@pytest.mark.parametrize("scope", ["layer", "global", "output"])
def test_what_an_earlier_update_removed_stays_out_and_counts(scope):
    sites = [linear("a", 6, 8), linear("b", 4, 8)]
    scores, eligible = tensors(sites, 2)
    first = choose_weights(step(sparsity=0.5, scope=scope), sites, scores, eligible, {}, progress=0.4)
    others, _ = tensors(sites, 3)
    gone = {name: ~keep for name, keep in first.keep.items()}
    second = choose_weights(step(sparsity=0.5, scope=scope), sites, others, eligible, gone, progress=1.0)
    assert removed(first, sites) <= removed(second, sites)
    n_there = sum(int(there.sum()) for there in eligible.values())
    if scope == "global":
        assert len(removed(second, sites)) == half_to_even(0.5 * n_there)


@pytest.mark.parametrize(
    "options",
    [{"sparsity": 0.999}, {"sparsity": 0.999, "scope": "global"}, {"sparsity": 0.999, "scope": "output"}]
    + [{"threshold": {"rule": "absolute", "value": 9.0}, "scope": scope} for scope in ("layer", "global", "output")],
    ids=str,
)
def test_no_weight_is_emptied_and_the_choice_says_so(options):
    sites = [linear("a", 2, 3), linear("b", 3, 3)]
    scores, _ = tensors(sites, 0)
    everything = {site.name: torch.ones(site.shape, dtype=torch.bool) for site in sites}
    choice = choose_weights(step(**options), sites, scores, everything, {}, progress=1.0)
    for site in sites:
        assert int(choice.keep[site.name].sum()) == 1
        assert choice.keep[site.name].reshape(-1)[scores[site.name].argmax()]
    assert any("keeps" in note for note in choice.notes)


@pytest.mark.parametrize("scope", ["layer", "output"])
@pytest.mark.parametrize(
    ("rule", "value", "cut"),
    [
        ("absolute", 0.3, lambda values: 0.3),
        ("relative_to_max", 0.5, lambda values: 0.5 * max(values)),
        ("mean_minus_std", 0.5, lambda values: mean(values) - 0.5 * std(values)),
    ],
)
def test_thresholds(rule, value, cut, scope):
    site = linear("a", 6, 8)
    scores, eligible = tensors([site], 4)
    choice = choose_weights(
        step(threshold={"rule": rule, "value": value}, scope=scope), [site], scores, eligible, {}, progress=1.0
    )
    entries = places(site, scores, eligible)
    pools = [entries] if scope == "layer" else [[e for e in entries if e[1][1] == row] for row in range(6)]
    expected = {
        place for pool in pools for score, place in pool if score < cut([score for score, _ in pool])
    }  # fmt: skip
    assert expected and removed(choice, [site]) == expected


def mean(values):
    return sum(values) / len(values)


def std(values):
    middle = mean(values)
    return (sum((value - middle) ** 2 for value in values) / len(values)) ** 0.5


def test_a_threshold_that_removes_nothing_says_so():
    model = zoo.build("bert")
    plan = hf_prune.make_plan(
        model,
        {"version": 1, "prune": [{"target": "weights", "threshold": {"rule": "mean_minus_std", "value": 2.0}}]},
    )
    assert not plan.masks  # mean - 2 std of |w| is negative
    assert len(plan.notes) == len(hf_prune.inspect_model(model).weights)
    assert all("mean_minus_std removes nothing" in note for note in plan.notes)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("pattern", ["2:4", {"block": [4, 4]}])
def test_patterns_hold_in_the_matrix_that_stays(name, pattern):
    """Neurons leave in between, so that columns move: the smaller matrix has the pattern."""
    model = zoo.build(name)
    of_weights = {"target": "weights", "pattern": pattern}
    if pattern != "2:4":
        of_weights["sparsity"] = 0.5
    plan = hf_prune.make_plan(
        model,
        {
            "version": 1,
            "prune": [
                {"target": "ffn_neurons", "sparsity": 0.4, "criterion": "random", "round_to": 4},
                of_weights,
            ],
        },
    )
    set_masks(model, plan.masks)
    remove_masked_(model)
    narrowed = {"llama": "model.layers.0.mlp.down_proj.weight", "gpt2": "transformer.h.0.mlp.c_proj.weight"}[name]
    keep = masks_of(model).weights[narrowed]
    keep = keep.t() if name == "gpt2" else keep  # (d_out, d_in)
    rows, columns = keep.shape
    assert columns < (48 if name == "llama" else 128)
    if pattern == "2:4":
        assert (keep.reshape(rows, columns // 4, 4).sum(-1) == 2).all()
    else:
        blocks = keep.reshape(rows // 4, 4, columns // 4, 4).transpose(1, 2).reshape(-1, 16).sum(-1)
        assert set(blocks.tolist()) == {0, 16}
        assert abs(int((blocks == 0).sum()) - len(blocks) / 2) <= 0.5


def test_a_size_that_units_left_undivided_is_refused_by_name():
    model = zoo.build("llama")
    steps = [{"target": "ffn_neurons", "sparsity": 0.1}, {"target": "weights", "pattern": "2:4"}]
    # 10 % of 48 neurons are 5: 43 inputs stay
    with pytest.raises(hf_prune.RecipeError, match=r"mlp.down_proj.weight: 4 of 2:4 does not divide its 43 inputs"):
        hf_prune.make_plan(model, {"version": 1, "prune": steps})
    plan = hf_prune.make_plan(model, {"version": 1, "prune": steps}, progress=0.5)
    assert any("the rest stays whole" in note and "round_to: 4" in note for note in plan.notes)


def test_weights_of_dropped_layers_are_left_alone():
    model = zoo.build("llama")
    steps = [{"target": "layers", "remove": [1]}, {"target": "weights", "sparsity": 0.5, "scope": "global"}]
    plan = hf_prune.make_plan(model, {"version": 1, "prune": steps})
    for name, keep in plan.masks.weights.items():
        assert keep.all() == ("layers.1." in name), name


def test_a_convolution_is_seen_as_outputs_by_the_entries_of_its_kernel():
    site = WeightSite("conv.weight", "conv", (2, 2, 1, 2), 1)
    scores = torch.tensor([[[[4.0, 1.0]], [[3.0, 2.0]]], [[[5.0, 8.0]], [[6.0, 7.0]]]])
    there = {site.name: torch.ones(site.shape, dtype=torch.bool)}
    choice = choose_weights(step(sparsity=0.5, scope="output"), [site], {site.name: scores}, there, {}, progress=1.0)
    assert site.d_in == 4
    expected = torch.tensor([[[[True, False]], [[True, False]]], [[[False, True]], [[False, True]]]])
    assert torch.equal(choice.keep[site.name], expected)


def test_a_criterion_that_looks_at_inputs_refuses_a_convolution():
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    model = transformers.ResNetModel(config)
    calibration = [{"pixel_values": torch.ones(2, 3, 32, 32)}]
    with pytest.raises(
        hf_prune.RecipeError, match=r"criterion wanda looks at the inputs of a matrix, and .*convolution"
    ):
        hf_prune.make_plan(
            model,
            {"version": 1, "prune": [{"target": "weights", "sparsity": 0.5, "criterion": "wanda"}]},
            calibration=calibration,
        )
    report = hf_prune.prune_(
        model, {"version": 1, "prune": [{"target": "weights", "sparsity": 0.5}]}, calibration=calibration
    )
    assert report.to_dict()["sparsity"]["weights"] == pytest.approx(0.5, abs=1e-3)
