"""`Pruner` in loops of one's own: masked entries stay zero, states go on where they were."""

import copy

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from hf_prune import Pruner, RecipeError
from hf_prune.apply.masks import masked_tensors, masks_of
from hf_prune.errors import CheckpointError
from tests import zoo
from tests.training.data import RECIPE, Tokens


class Langevin(torch.optim.SGD):
    """SGD with noise (Welling & Teh 2011): it moves weights that have neither gradient nor momentum."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(torch.randn_like(parameter), alpha=1e-3)


OPTIMIZERS = {
    "sgd with noise": lambda p: Langevin(p, lr=0.1),
    "sgd with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.3),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.9),
    "adamw, foreach off": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False),
}


def loader(batch_size=4):
    return DataLoader(Tokens(), batch_size=batch_size)


def n_masked_and_alive(model):
    """How many entries are masked, and how many of those are not zero."""
    masked, alive = 0, 0
    for entry, parameter in masked_tensors(model):
        values = entry.values(parameter)
        masked, alive = masked + values.numel(), alive + int((values != 0).sum())
    return masked, alive


def train(model, optimizer, pruner, after_step, *, accumulate=1, clip=None, autocast=False):
    for n, batch in enumerate(loader(), 1):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**batch).loss
        loss.backward()
        if n % accumulate:
            continue
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        pruner.step()
        after_step()
        optimizer.zero_grad()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_not_one_masked_entry_is_non_zero_after_any_step(optimizer, accumulate, dtype):
    model = zoo.build("bert", dtype).train()
    steps = OPTIMIZERS[optimizer](model.parameters())
    pruner = Pruner(model, steps, RECIPE, n_steps=8 // accumulate, calibration=list(loader()))
    seen = []

    def look():
        masked, alive = n_masked_and_alive(model)
        assert alive == 0
        seen.append(masked)

    train(model, steps, pruner, look, accumulate=accumulate, clip=0.1, autocast=dtype is torch.float32)
    assert seen == sorted(seen) and seen[-1] > 1000, "masks grow"
    assert pruner.is_final
    sizes = [layer.intermediate.dense.out_features for layer in model.bert.encoder.layer]
    pruner.finish()
    assert sizes == [48] * 3
    assert sum(layer.intermediate.dense.out_features for layer in model.bert.encoder.layer) == 72
    masked, alive = n_masked_and_alive(model)
    assert masked > 0 and alive == 0, "single weights stay masked in the smaller model"


def test_masked_entries_have_no_part_in_clipping():
    model = zoo.build("bert").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = Pruner(model, optimizer, {**RECIPE, "schedule": {"name": "one_shot", "begin": 0}}, n_steps=4,
                    calibration=list(loader()))  # fmt: skip
    pruner.step()
    batch = next(iter(loader()))
    with torch.random.fork_rng():
        model(**batch).loss.backward()
    for entry, parameter in masked_tensors(model):
        assert (entry.values(parameter.grad) == 0).all()
    alive = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    pruner.detach()
    model.zero_grad()
    with torch.random.fork_rng():
        model(**batch).loss.backward()
    assert torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9) > alive
    # the norm of the gradients of all entries but the masked ones
    there = {name: torch.ones(p.shape, dtype=torch.bool) for name, p in model.named_parameters()}
    for entry, _ in masked_tensors(model):
        entry.zero_(there[entry.name])
    squares = [p.grad[there[name]].double().square().sum() for name, p in model.named_parameters()]
    assert float(alive) == pytest.approx(float(sum(squares)) ** 0.5, rel=1e-6)


def test_moments_of_what_leaves_are_dropped():
    model = zoo.build("bert").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    pruner = Pruner(model, optimizer, RECIPE, n_steps=8, calibration=list(loader()))

    def look():
        for entry, parameter in masked_tensors(model):
            state = optimizer.state[parameter]
            assert (entry.values(state["exp_avg"]) == 0).all()
            assert (entry.values(state["exp_avg_sq"]) == 0).all()

    train(model, optimizer, pruner, look)
    assert masks_of(model)


def test_what_left_stays_out():
    model = zoo.build("bert").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    recipe = {**RECIPE, "schedule": {"name": "constant", "begin": 0.1, "end": 1.0, "updates": 7}}
    pruner = Pruner(model, optimizer, recipe, n_steps=8, calibration=list(loader()))
    before = {"masks": None}

    def look():
        masks = masks_of(model)
        if before["masks"] is not None:
            assert masks & before["masks"] == masks
        before["masks"] = masks

    train(model, optimizer, pruner, look)


def test_a_state_goes_on_where_it_was():
    def made():
        model = zoo.build("bert").eval()  # no dropout: the two runs see the same
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        return model, optimizer, Pruner(model, optimizer, RECIPE, n_steps=8, calibration=list(loader()))

    def run(model, optimizer, pruner, batches):
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step()
            pruner.step()
            optimizer.zero_grad()

    batches = list(loader())
    model, optimizer, pruner = made()
    run(model, optimizer, pruner, batches[:3])
    state = copy.deepcopy(pruner.state_dict())
    weights, moments = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    run(model, optimizer, pruner, batches[3:])
    again, its_optimizer, its_pruner = made()
    again.load_state_dict(weights)
    its_optimizer.load_state_dict(moments)
    its_pruner.load_state_dict(state)
    assert n_masked_and_alive(again)[0] > 0
    run(again, its_optimizer, its_pruner, batches[3:])
    assert masks_of(again) == masks_of(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_a_state_of_another_recipe_is_refused_with_the_difference():
    model = zoo.build("bert")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = Pruner(model, optimizer, RECIPE, n_steps=8).state_dict()
    other = copy.deepcopy(RECIPE)
    other["prune"][0]["sparsity"] = 0.75
    with pytest.raises(CheckpointError, match=r"prune\.0\.sparsity: the checkpoint has 0\.5, this run 0\.75"):
        Pruner(model, optimizer, other, n_steps=8).load_state_dict(state)


def test_recipes_are_checked_before_the_loop():
    model = zoo.build("bert")
    with pytest.raises(RecipeError, match="sparsity"):
        Pruner(model, torch.optim.SGD(model.parameters(), lr=0.1), {"version": 1, "prune": [{"target": "layers"}]},
               n_steps=8)  # fmt: skip


def test_accelerate_counts_steps_that_the_optimizer_took():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = zoo.build("bert").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer, data = accelerator.prepare(model, optimizer, loader())
    pruner = Pruner(model, optimizer, RECIPE, n_steps=4, calibration=list(loader()))
    for batch in data:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            pruner.step()
            optimizer.zero_grad()
    assert pruner.n_done == 4 and pruner.is_final
    report = pruner.finish().to_dict()
    assert report["sparsity"]["ffn_neurons"] == 0.5
    assert report["verification"]["inputs"] == "calibration"
