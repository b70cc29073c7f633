"""The proof behind physical removal: for every family and target, the smaller model computes what the masked one does."""

import copy

import pytest
import torch

from hf_prune.apply.masks import masks_of, set_masks
from hf_prune.apply.shrink import remove_masked_
from hf_prune.checkpoint import settle_config_
from hf_prune.errors import PruneError
from hf_prune.plan import KeepMasks
from hf_prune.structure import inspect_model
from hf_prune.structure.inputs import example_inputs
from tests import zoo


TARGETS = ("ffn_neurons", "attention_heads", "layers")
PARTS = ("layers.attention", "layers.feed_forward")


def some_masks(model, targets, seed=0):
    """Uneven random masks: of each site one unit or two leave, of each stack the first block, or the last part."""
    generator = torch.Generator().manual_seed(seed)
    units = {}
    for number, site in enumerate(inspect_model(model).sites):
        if site.kind in targets and not (site.branches and site.n_units == 1):
            keep = torch.ones(site.n_units, dtype=torch.bool)
            n_removed = 1 if site.target == "layers" or site.n_units < 3 else 1 + number % 2
            order = torch.randperm(site.n_units, generator=generator)
            if site.target == "layers":
                order = torch.arange(site.n_units).flip(0) if site.branches else torch.arange(site.n_units)
            keep[order[:n_removed]] = False
            units[site.key] = keep
    return KeepMasks(units=units)


def shrink_(model):
    return settle_config_(model, remove_masked_(model).kept_layers)


def outputs(model, inputs):
    with torch.no_grad():
        return [value for value in model(**inputs).values() if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize(
    "targets", [*((target,) for target in (*TARGETS, *PARTS)), TARGETS, (*TARGETS[:2], *PARTS)], ids="+".join
)
@pytest.mark.parametrize("name", zoo.MODELS)
def test_masked_equals_shrunk_and_saved_equals_loaded(name, targets, tmp_path):
    model = zoo.build(name, torch.float64)
    masks = some_masks(model, targets)
    if not masks:
        # ALiBi's slopes follow from the number of heads, so that fewer heads are another function; a shared block has one part
        reasons = {("bloom", "attention_heads"): "ALiBi", **{("albert", part): "called 3 times" for part in PARTS}}
        assert reasons[name, *targets] in next(r.reason for r in inspect_model(model).refusals if r.kind == targets[0])
        return
    inputs = example_inputs(model)
    dense = outputs(model, inputs)
    set_masks(model, masks)
    masked = outputs(model, inputs)
    before = sum(parameter.numel() for parameter in model.parameters())
    shrink_(model)
    for expected, actual, original in zip(masked, outputs(model, inputs), dense, strict=True):
        assert (expected - actual).abs().max() <= 1e-6 * expected.abs().max()
        assert (expected - original).abs().max() > 1e-4 * original.abs().max(), "the masks changed nothing"
    after = sum(parameter.numel() for parameter in model.parameters())
    assert after < before or (name, targets) == ("albert", ("layers",)), "nothing left the model"
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    for expected, actual in zip(masked, outputs(loaded, inputs), strict=True):
        assert (expected - actual).abs().max() <= 1e-6 * expected.abs().max()


def test_masked_weights_are_zero_and_the_rest_is_untouched():
    model = zoo.build("llama")
    original = copy.deepcopy(model.state_dict())
    masks = some_masks(model, ("ffn_neurons",))
    set_masks(model, masks)
    site = inspect_model(model).of("ffn_neurons")[0]
    keep = masks.units[site.key]
    gate = f"{site.name}.gate_proj.weight"
    assert not model.state_dict()[gate][~keep].any()
    assert torch.equal(model.state_dict()[gate][keep], original[gate][keep])
    down = f"{site.name}.down_proj.weight"
    assert not model.state_dict()[down][:, ~keep].any()
    assert torch.equal(model.state_dict()[down][:, keep], original[down][:, keep])
    assert torch.equal(model.state_dict()["lm_head.weight"], original["lm_head.weight"])


def test_masks_survive_a_deepcopy_and_stay_out_of_the_state_dict():
    model = zoo.build("bert")
    keys = set(model.state_dict())
    set_masks(model, some_masks(model, TARGETS))
    twin = copy.deepcopy(model)
    assert masks_of(twin) == masks_of(model)
    assert set(model.state_dict()) == keys
    inputs = example_inputs(model)
    assert torch.equal(outputs(model, inputs)[0], outputs(twin, inputs)[0])


def test_weight_masks_follow_the_tensors_that_shrink():
    model = zoo.build("llama")
    structure = inspect_model(model)
    layers, neurons = structure.of("layers")[0], structure.of("ffn_neurons")[2]
    name = "model.layers.2.mlp.up_proj.weight"
    weight_keep = torch.rand(model.get_parameter(name).shape, generator=torch.Generator().manual_seed(0)) > 0.5
    rows = torch.arange(48) % 3 != 0
    masks = KeepMasks(
        units={layers.key: torch.tensor([True, False, True]), neurons.key: rows}, weights={name: weight_keep}
    )
    set_masks(model, masks)
    remove_masked_(model)
    moved = masks_of(model).weights
    assert list(moved) == ["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(moved["model.layers.1.mlp.up_proj.weight"], weight_keep[rows])
    assert not model.get_parameter("model.layers.1.mlp.up_proj.weight")[~weight_keep[rows]].any()


def test_a_masked_layer_passes_its_gradient_through_and_gets_zeros():
    model = zoo.build("bert")
    set_masks(model, some_masks(model, ("layers",)))
    inputs = example_inputs(model)
    model(**inputs).logits.sum().backward()
    masked, kept = model.bert.encoder.layer[0], model.bert.encoder.layer[1]
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in masked.parameters())
    assert any(parameter.grad.any() for parameter in kept.parameters())
    assert model.bert.embeddings.word_embeddings.weight.grad.any()


def test_a_pass_that_breaks_off_does_not_shift_the_calls_of_a_shared_block():
    model = zoo.build("albert")
    (site,) = inspect_model(model).of("layers")
    set_masks(model, KeepMasks(units={site.key: torch.tensor([True, False, True])}))
    inputs = example_inputs(model)
    before = outputs(model, inputs)[0]
    block, calls = model.get_submodule(site.blocks[0]), []

    def second_call_fails(*args):
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError

    hook = block.register_forward_pre_hook(second_call_fails)
    with pytest.raises(MemoryError):
        model(**inputs)
    hook.remove()
    twin = copy.deepcopy(model)
    for one in (model, twin):
        assert torch.equal(outputs(one, inputs)[0], before)
    set_masks(model, KeepMasks())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_layer_numbers_follow_so_that_caches_work():
    model = zoo.build("llama", torch.float64)
    set_masks(model, some_masks(model, TARGETS))
    shrink_(model)
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1]
    ids = example_inputs(model)["input_ids"]
    cached = model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=True, pad_token_id=0)
    plain = model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False, pad_token_id=0)
    assert torch.equal(cached, plain)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (KeepMasks(units={"ffn_neurons:nowhere": torch.tensor([True])}), "names site 'ffn_neurons:nowhere'"),
        (KeepMasks(units={"layers:model.layers": torch.ones(4, dtype=torch.bool)}), r"expected torch.bool \(3,\)"),
        (KeepMasks(units={"layers:model.layers": torch.zeros(3, dtype=torch.bool)}), "keeps none of 3 units"),
        (KeepMasks(weights={"lm_head.weight": torch.ones(2, dtype=torch.bool)}), "expected torch.bool"),
    ],
)
def test_masks_that_do_not_fit_are_refused_and_change_nothing(masks, message):
    model = zoo.build("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PruneError, match=message):
        set_masks(model, masks)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
