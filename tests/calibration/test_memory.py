"""Beyond the weights, memory is one block plus the calibration activations; with `offload: disk` it is one block and one batch."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from hf_prune import make_plan
from hf_prune.calibration import collect
from hf_prune.calibration.statistics import FIRING, MEAN_INPUTS, SQUARED_INPUTS
from hf_prune.structure import inspect_model


D_MODEL, D_FF, B, T = 64, 256, 4, 32
HIDDEN = B * T * D_MODEL * 4  # bytes of one batch's hidden states


class LiveBytes(TorchDispatchMode):
    """Inside, bytes of storage that is there at once, of tensors that were made inside."""

    def __init__(self):
        super().__init__()
        self.peak = 0
        self._known = {}

    @property
    def now(self):
        # what is put away has no bytes meanwhile, and a mapped file (which can't be resized) takes none
        there = (storage for each in self._known.values() if (storage := each()) is not None)
        return sum(storage.nbytes() for storage in there if storage.resizable())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in self._known and id(storage) not in given:
                    self._known[id(storage)] = weakref.ref(storage)
                    weakref.finalize(storage, self._known.pop, id(storage))
                    self.peak = max(self.peak, self.now)
        return result


REPAIR = {"target": "ffn_neurons", "sparsity": 0.5, "criterion": "activation", "compensation": "least_squares"}
BOTH = [REPAIR, {"target": "attention_heads", "sparsity": 0.5, "compensation": "least_squares"}]
STEPS = {
    "least_squares": BOTH,
    "sparsegpt": [{"target": "weights", "sparsity": 0.5, "criterion": "sparsegpt"}],
    "sparsegpt-dense": [
        {"target": "weights", "sparsity": 0.5, "criterion": {"name": "sparsegpt", "dense_target": True}}
    ],
}


def model_and_batches(n_blocks, n_batches):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=D_MODEL, intermediate_size=D_FF, num_hidden_layers=n_blocks, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=T, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    batches = []
    for _ in range(n_batches):
        mask = torch.ones(B, T, dtype=torch.long)
        mask[0, T // 2 :] = 0
        batches.append({"input_ids": torch.randint(3, 50, (B, T)), "attention_mask": mask})
    return model, batches


def peak(steps, n_blocks=2, n_batches=4, offload="none"):
    """Live bytes at most while a plan is made, without those of the plan itself and of which weights are there, a byte each."""
    model, batches = model_and_batches(n_blocks, n_batches)
    recipe = {"version": 1, "prune": STEPS[steps], "calibration": {"offload": offload}}
    with LiveBytes() as live:
        plan = make_plan(model, recipe, calibration=batches)
    there = plan.masks.weights.values()
    held = [*plan.replacements.values(), *plan.masks.units.values(), *there, *there]
    return live.peak - sum(tensor.numel() * tensor.element_size() for tensor in held)


def test_the_measure_measures():
    with LiveBytes() as live:
        a = torch.zeros(1000)
        b = a.view(10, 100) + 1
        del a
        c = b.square()
        del b, c
    assert live.peak == 8000 and live.now == 0


def test_collecting_statistics_takes_no_more_for_more_blocks_or_batches():
    def collecting(n_blocks, n_batches):
        model, batches = model_and_batches(n_blocks, n_batches)
        structure = inspect_model(model)
        with LiveBytes() as live:
            collect(model, batches, frozenset({SQUARED_INPUTS, MEAN_INPUTS, FIRING}), structure.weights)
        return live.peak

    few = collecting(2, 4)
    assert collecting(2, 16) == few
    # the sums themselves: three numbers of eight bytes for each input of seven matrices, and how many tokens each
    assert collecting(6, 4) - few <= 4 * 3 * 8 * (6 * D_MODEL + D_FF + 7)


@pytest.mark.parametrize("offload", ["none", "disk"])
@pytest.mark.parametrize("steps", STEPS)
def test_the_peak_does_not_grow_with_the_number_of_blocks(steps, offload):
    few, many = peak(steps, 2, offload=offload), peak(steps, 6, offload=offload)
    assert many - few < HIDDEN, f"{few} with 2 blocks, {many} with 6"


@pytest.mark.parametrize("steps", ["least_squares", "sparsegpt", "sparsegpt-dense"])
def test_on_disk_the_peak_does_not_grow_with_the_number_of_batches(steps):
    few, many = (peak(steps, n_batches=n, offload="disk") for n in (3, 12))
    assert many - few < HIDDEN, f"{few} with 3 batches, {many} with 12"
    in_memory = peak(steps, n_batches=12)
    assert in_memory - many > 10 * HIDDEN
