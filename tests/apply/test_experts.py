"""Mixtures of experts: neurons of stacked experts and whole experts, masked ≡ shrunk ≡ loaded, and what a unit holds."""

import copy

import pytest
import torch

import hf_prune
from hf_prune.apply.masks import set_masks
from hf_prune.apply.shrink import remove_masked_
from hf_prune.calibration import collect
from hf_prune.calibration.statistics import ROUTED_NORMS, ROUTED_SHARES
from hf_prune.checkpoint import settle_config_
from hf_prune.errors import PruneError, UnsupportedModelError
from hf_prune.plan import KeepMasks
from hf_prune.structure import inspect_model
from hf_prune.structure.inputs import example_inputs
from tests import zoo


def needs_its_router(name):
    if name == "glm4_moe" and zoo.is_before("5.23"):
        pytest.skip("its router gives something else in this Transformers, and is refused")


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def load(model, folder):
    return type(model).from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")


def leaving(model, target, n_by_site):
    """Masks under which the first units leave, as many as `n_by_site` says of each in turn."""
    sites = inspect_model(model).of(target)
    n = dict(zip(sites, n_by_site(len(sites)), strict=True))
    return KeepMasks(units={s.key: torch.arange(s.n_units) >= n[s] for s in sites if n[s]})


@pytest.mark.parametrize("n_by_site", [lambda n: [2] * n, lambda n: range(1, n + 1)], ids=["equal", "unequal"])
@pytest.mark.parametrize("target", ["experts", "ffn_neurons"])
@pytest.mark.parametrize("name", zoo.MIXTURES)
def test_masked_equals_shrunk_and_saved_equals_loaded(name, target, n_by_site, tmp_path):
    if target == "experts":
        needs_its_router(name)
    model = zoo.build(name, torch.float64)
    inputs = example_inputs(model)
    dense = logits(model, inputs)
    set_masks(model, leaving(model, target, n_by_site))
    masked = logits(model, inputs)
    before = sum(parameter.numel() for parameter in model.parameters())
    verdict = settle_config_(model, remove_masked_(model).kept_layers)
    assert (masked - dense).abs().max() > 1e-4 * dense.abs().max(), "the masks changed nothing"
    assert (logits(model, inputs) - masked).abs().max() <= 1e-6 * masked.abs().max()
    assert sum(parameter.numel() for parameter in model.parameters()) < before
    model.save_pretrained(tmp_path)
    loaded = load(model, tmp_path)
    assert (logits(loaded, inputs) - masked).abs().max() <= 1e-6 * masked.abs().max()
    if list(n_by_site(2)) == [2, 2] and target == "experts":
        assert verdict.loads_with == "transformers", "equal numbers of experts are a stock config"
    elif list(n_by_site(2)) == [1, 2]:
        assert verdict.loads_with == "hf_prune"


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "glm4_moe"])
def test_a_mixture_leaves_whole_as_the_feed_forward_part_of_a_layer(name, tmp_path):
    model = zoo.build(name, torch.float64)
    inputs = example_inputs(model)
    (site,) = inspect_model(model).of("layers", "feed_forward")
    assert site.numbers == (0, 1, 2)
    dense = logits(model, inputs)
    set_masks(model, KeepMasks(units={site.key: torch.tensor([True, True, False])}))
    masked = logits(model, inputs)
    settle_config_(model, remove_masked_(model).kept_layers)
    assert (masked - dense).abs().max() > 1e-4 * dense.abs().max()
    assert (logits(model, inputs) - masked).abs().max() <= 1e-6 * masked.abs().max()
    assert next(model.model.layers[2].mlp.parameters(), None) is None
    model.save_pretrained(tmp_path)
    assert (logits(load(model, tmp_path), inputs) - masked).abs().max() <= 1e-6 * masked.abs().max()


@pytest.mark.parametrize("name", zoo.MIXTURES)
def test_fewer_experts_than_a_token_was_sent_to(name, tmp_path):
    needs_its_router(name)
    model = zoo.build(name, torch.float64)
    inputs = example_inputs(model)
    masks = leaving(model, "experts", lambda n: [5] * n)
    if name == "glm4_moe":
        with pytest.raises(PruneError, match="keeps 1 of 6 units, and its router compares 2; set min_keep to 2"):
            set_masks(model, masks)
        return
    set_masks(model, masks)
    masked = logits(model, inputs)
    settle_config_(model, remove_masked_(model).kept_layers)
    assert (logits(model, inputs) - masked).abs().max() <= 1e-6 * masked.abs().max()
    assert model.config.num_experts_per_tok == 1
    model.save_pretrained(tmp_path)
    assert (logits(load(model, tmp_path), inputs) - masked).abs().max() <= 1e-6 * masked.abs().max()


def test_a_masked_expert_is_asked_by_no_token_and_gets_no_gradient():
    model = zoo.build("mixtral")
    inputs = example_inputs(model)
    set_masks(model, leaving(model, "experts", lambda n: [2] * n))
    shares = collect(model, [inputs], frozenset({ROUTED_SHARES}), inspect_model(model).of("experts")).routed_shares
    for share in shares.values():
        assert not share[:2].any() and share.sum() == pytest.approx(2)  # two experts a token
    model(**inputs).logits.sum().backward()
    for layer in model.model.layers:
        assert not layer.mlp.experts.down_proj.grad[:2].any() and layer.mlp.experts.down_proj.grad[2:].any()
        assert not layer.mlp.gate.weight.grad[:2].any()


def test_masks_that_are_taken_off_leave_no_hook_and_survive_a_copy():
    model = zoo.build("mixtral")
    inputs = example_inputs(model)
    set_masks(model, leaving(model, "experts", lambda n: [2] * n))
    assert torch.equal(logits(copy.deepcopy(model), inputs), logits(model, inputs))
    set_masks(model, KeepMasks())
    assert not any(module._forward_hooks for module in model.modules())


def test_statistics_of_experts_by_a_plain_loop():
    """REAP: the mean over an expert's tokens of the router's weight times the norm of its output; padding left out."""
    model = zoo.build("mixtral", torch.float64)
    inputs = example_inputs(model)
    inputs["attention_mask"][:, -3:] = 0
    site = inspect_model(model).of("experts")[1]
    seen = {}
    mlp = model.model.layers[1].mlp
    handle = mlp.register_forward_pre_hook(lambda m, args: seen.update(x=args[0]))
    statistics = collect(model, [inputs], frozenset({ROUTED_SHARES, ROUTED_NORMS}), [site])
    handle.remove()
    tokens = seen["x"][inputs["attention_mask"].bool()]
    norms, n = torch.zeros(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    for x in tokens:
        probabilities = torch.softmax(mlp.gate.weight @ x, 0)
        chosen = probabilities.topk(2).indices
        for expert in chosen.tolist():
            gate, up = (mlp.experts.gate_up_proj[expert] @ x).chunk(2)
            output = mlp.experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
            norms[expert] += (probabilities[expert] / probabilities[chosen].sum() * output.norm()).detach()
            n[expert] += 1
    # the model's router works in float32
    assert torch.allclose(statistics.routed_norms[site.key], norms / n.clamp(min=1), rtol=1e-5)
    assert torch.equal(statistics.routed_shares[site.key], n / len(tokens))


@pytest.mark.parametrize("criterion", ["l2", "routing", "activation", "loss_change"])
def test_experts_leave_by_a_recipe_verified(criterion, tmp_path):
    model = zoo.build("mixtral")
    inputs = example_inputs(model)
    recipe = {"version": 1, "prune": [{"target": "experts", "sparsity": 1 / 3, "criterion": criterion}]}
    report = hf_prune.prune_(model, recipe, calibration=[{**inputs, "labels": inputs["input_ids"]}])
    assert [layer.mlp.experts.down_proj.shape[0] for layer in model.model.layers] == [4, 4, 4]
    assert model.config.num_local_experts == 4 and "experts" in str(report)


def test_neurons_of_stacked_experts_leave_by_the_loss_and_not_by_what_no_hook_sees():
    model = zoo.build("mixtral")
    inputs = example_inputs(model)
    batches = [{**inputs, "labels": inputs["input_ids"]}]
    step = {"target": "ffn_neurons", "sparsity": 0.5}
    with pytest.raises(UnsupportedModelError, match=r"stacked weights.*take l1, l2"):
        hf_prune.prune_(model, {"version": 1, "prune": [step | {"criterion": "activation"}]}, calibration=batches)
    hf_prune.prune_(model, {"version": 1, "prune": [step | {"criterion": "gradient"}]}, calibration=batches)
    assert model.config.intermediate_size == 24


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(n_group=2), "2 groups of experts"),
        (
            dict(n_routed_experts=32, moe_intermediate_size=24),
            None,
        ),  # as many as d_model: the axis is told by dimension
    ],
)
def test_routers_that_would_choose_otherwise_are_refused(change, reason):
    needs_its_router("glm4_moe")
    structure = inspect_model(zoo.build("glm4_moe", **change))
    refused = [refusal.reason for refusal in structure.refusals if refusal.target == "experts"]
    assert (reason is None and structure.of("experts")) or (reason or "can't be told") in refused[0]
