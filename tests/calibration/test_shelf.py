"""What waits on disk is what waits in memory, bit for bit, and nothing is left behind."""

import gc
import tempfile
from pathlib import Path

import pytest
import torch

from hf_prune import make_plan
from hf_prune.calibration.batches import Batch
from hf_prune.calibration.blocks import record_chain
from hf_prune.calibration.collect import evaluation
from hf_prune.calibration.shelf import Interned, OnDisk, Shelf, open_shelf, taken
from hf_prune.errors import CalibrationError
from hf_prune.structure import stacks_of
from hf_prune.structure.inputs import example_inputs
from tests import zoo


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where temporary folders are made."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.bool, torch.int64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tensor_comes_back_as_it_was(dtype, folder):
    with open_shelf("disk") as shelf:
        for shape in ((), (3,), (2, 3, 4), (0, 4)):
            tensor = torch.randn(shape).mul(9).to(dtype)
            for given in (tensor, tensor.expand(2, *shape), tensor.transpose(0, -1) if shape else tensor):
                back = taken(shelf.put(given))
                assert back.dtype == dtype and back.shape == given.shape and torch.equal(back, given)


def test_a_file_is_there_as_long_as_something_needs_it(folder):
    with open_shelf("disk") as shelf:
        states = shelf.states()
        states.append(torch.zeros(4))
        other = states.copy()
        mapped = states[0]
        states[0] = torch.ones(4)
        gc.collect()
        assert len(list(folder.rglob("*.bin"))) == 2
        mapped += 7  # changes no file
        assert torch.equal(other[0], torch.zeros(4)) and torch.equal(states[0], torch.ones(4))
        del other
        gc.collect()
        assert len(list(folder.rglob("*.bin"))) == 1
        assert torch.equal(mapped, torch.full((4,), 7.0))
    assert not list(folder.iterdir())


def test_memory_holds_the_tensor_itself():
    with open_shelf("none") as shelf:
        tensor = torch.zeros(3)
        states = shelf.states()
        states.append(tensor)
        assert states[0] is tensor and len(states) == 1


@pytest.mark.parametrize("offload", ["none", "disk"])
def test_equal_arguments_are_held_once(offload, folder):
    with open_shelf(offload) as shelf:
        interned = Interned(shelf)
        held = []
        for _ in range(3):
            interned.next_batch()
            cos, mask = torch.arange(6.0), torch.ones(2, 2, dtype=torch.bool)
            pair = (cos, mask)
            first = interned.put({"pair": pair, "length": 6, "none": None})
            again = interned.put({"pair": pair})
            assert first["pair"] is again["pair"] and first["length"] == 6 and first["none"] is None
            held += first["pair"]
        assert len({id(each) for each in held}) == 2
        assert isinstance(held[0], OnDisk) == (offload == "disk")
        assert torch.equal(taken(held[0]), torch.arange(6.0))
        other = interned.put(torch.arange(6.0) + 1)
        assert torch.equal(taken(other), torch.arange(6.0) + 1)


@pytest.mark.parametrize("name", ["llama", "bart", "gemma3", "t5"])
def test_a_chain_on_disk_is_the_chain_in_memory(name, folder):
    model = zoo.build(name)
    batches = [Batch.of(n, example_inputs(model, seed=n, length=8), torch.device("cpu")) for n in range(3)]
    with torch.no_grad(), evaluation(model, 0), open_shelf("disk") as shelf:
        for stack, blocks in stacks_of(model).items():
            plain = record_chain(model, stack, blocks, batches, {})
            stored = record_chain(model, stack, blocks, batches, {}, shelf)
            for position, block in enumerate(blocks):
                for chain in (plain, stored):
                    chain.run_(position, model.get_submodule(block))
                assert all(torch.equal(plain.hidden[n], stored.hidden[n]) for n in range(3))
            tensors = [arg for calls in stored.calls for call in calls for arg in _leaves((call.args, call.kwargs))]
            assert not any(isinstance(each, torch.Tensor) for each in tensors)
    assert not list(folder.iterdir())


def _leaves(value):
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        for each in value:
            yield from _leaves(each)
    else:
        yield value


STEPS = {
    "repair": [
        {"target": "ffn_neurons", "sparsity": 0.5, "criterion": "activation", "compensation": "least_squares"},
        {"target": "attention_heads", "sparsity": 0.5, "compensation": "least_squares"},
    ],
    "layers": [{"target": "layers", "remove": [1], "compensation": "least_squares"}],
    "sparsegpt": [
        {"target": "weights", "sparsity": 0.5, "criterion": {"name": "sparsegpt", "dense_target": True}},
    ],
}


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("steps", STEPS)
def test_plans_are_the_same_bit_for_bit(steps, name, folder):
    model = zoo.build(name)
    batches = [example_inputs(model, seed=n, length=12, batch_size=2) for n in range(6)]
    for batch in batches:
        batch["attention_mask"][:, 9:] = 0
    prune = [
        {**step, "include": ["*encoder*"]} if step["target"] == "layers" and name == "t5" else step
        for step in STEPS[steps]
    ]
    plans = [
        make_plan(model, {"version": 1, "prune": prune, "calibration": {"offload": offload}}, calibration=batches)
        for offload in ("none", "disk")
    ]
    assert plans[0].masks == plans[1].masks and plans[0].notes == plans[1].notes
    assert plans[0].replacements.keys() == plans[1].replacements.keys() and plans[0].replacements
    for key, value in plans[0].replacements.items():
        assert torch.equal(value, plans[1].replacements[key]), key
    gc.collect()
    assert not list(folder.iterdir())


def test_nothing_is_left_after_an_error(folder):
    model = zoo.build("llama")
    batches = [example_inputs(model, seed=n, length=12, batch_size=2) for n in range(3)]
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0] = float("nan")
    recipe = {"version": 1, "prune": STEPS["layers"], "calibration": {"offload": "disk"}}
    with pytest.raises(CalibrationError):
        make_plan(model, recipe, calibration=batches)
    assert not list(folder.iterdir())


def test_a_shelf_without_a_folder_is_in_memory():
    assert not Shelf().is_on_disk and Shelf(Path("x")).is_on_disk


def test_what_outlasts_the_shelf_is_there_when_its_folder_is_gone(folder):
    x = torch.randn(3, 4)
    with open_shelf("disk") as shelf:
        lasting = shelf.outlasting(x)
    assert not list(folder.iterdir()) and torch.equal(lasting, x) and lasting is not x
    assert Shelf().outlasting(x) is x
