"""FSDP2 on two processes by gloo: parameters are DTensors, and so each process holds its part of the masks."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from hf_prune.checkpoint import is_complete
from tests.processes import attempt, launch
from tests.training.data import RECIPE
from tests.training.job import LAYER, NO_DROPOUT


JOB = Path(__file__).with_name("job.py")
# not the embeddings too, as `_no_split_modules` of BERT has it: Accelerate 1.15 would shard those inside again, and torch refuses
SHARDED = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["BertLayer"]}}
OPTIONS = {
    "recipe": {**RECIPE, "prune": [LAYER, *RECIPE["prune"]]},
    "model": NO_DROPOUT,
    "training": {"num_train_epochs": 2, "max_grad_norm": 0.1, "save_strategy": "steps", "save_steps": 6},
}

# what gives weights new values at an update, beside a teacher's loss and by itself
ONE_SHOT = {**RECIPE, "schedule": {"name": "one_shot", "begin": 0.1}}
NEURONS = {"target": "ffn_neurons", "sparsity": 0.5, "criterion": "activation", "compensation": "least_squares"}
# one layer: in a random model what rounding does to the weights grows from each to the next
SPARSEGPT = {"target": "weights", "sparsity": 0.4, "criterion": "sparsegpt", "include": ["*.layer.0.*"]}
UPDATED = {
    "repaired and distilled": {
        "recipe": {
            **ONE_SHOT,
            "prune": [NEURONS],
            "distillation": {"temperature": 2.0, "weight": 0.5, "hidden_states": 0.1},
        },
        "teacher": 5,
    },
    "sparsegpt": {"recipe": {**ONE_SHOT, "prune": [SPARSEGPT], "calibration": {"samples": 32, "batch_size": 4}}},
}


def trained(directory, name, n_processes, sharded=None, **options):
    """What it told, and what each process ended with."""
    training = {**OPTIONS["training"], **(sharded or {}), **options.pop("training", {})}
    spec = json.dumps({**OPTIONS, **options, "training": training})
    launch(JOB, directory, name, spec, n_processes=n_processes)
    told = json.loads((directory / f"{name}.json").read_text())
    return told, [load_file(directory / f"{name}-rank{rank}.safetensors") for rank in range(n_processes)]


def alike(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_it_ends_where_one_process_does(tmp_path):
    told, (first, second) = trained(tmp_path, "sharded", 2, SHARDED)
    expected, (alone,) = trained(tmp_path, "alone", 1)
    require_equal(tmp_path, told, first, second, expected, alone)
    # resumed inside the schedule, and after it
    for step in (6, 12):
        folder = tmp_path / "sharded" / f"checkpoint-{step}"
        assert (folder / "pytorch_model_fsdp.bin").exists(), "it was FSDP that wrote it"
        require_whole_checkpoint(folder, alone_at=tmp_path / "alone" / f"checkpoint-{step}")
        _, resumed = trained(tmp_path, f"from-{step}", 2, SHARDED, resume=str(folder))
        assert alike(resumed[0], first) and alike(resumed[1], first), step


@pytest.mark.slow
@pytest.mark.parametrize("how", UPDATED)
def test_with_new_values_it_ends_where_whole_copies_do(tmp_path, how):
    require_updated_alike(tmp_path, SHARDED, UPDATED[how])


def require_updated_alike(directory, sharded, options):
    """As DistributedDataParallel on as many processes: sums of another order would turn a near-tie of sparsegpt round.

    What sums of the same order leave, 1e-7 of a weight, the inverse of a Gram matrix of few tokens makes 1e-2 of it.
    """
    told, (first, second) = trained(directory, "sharded", 2, sharded, **options)
    expected, (whole, _) = trained(directory, "whole", 2, **options)
    assert alike(first, second) and told["report"]["sparsity"] == expected["report"]["sparsity"]
    for name, weight in first.items():
        assert torch.equal(weight == 0, whole[name] == 0), name
        assert torch.allclose(weight, whole[name], atol=0.05 if options is UPDATED["sparsegpt"] else 1e-4), name
    losses = [[entry["loss"] for entry in each["log"] if "loss" in entry] for each in (told, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.slow
def test_in_mixed_precision_it_reaches_and_holds_the_sparsity(tmp_path):
    told, (first, second) = trained(tmp_path, "sharded", 2, SHARDED, training={"bf16": True})
    expected, _ = trained(tmp_path, "alone", 1)
    assert alike(first, second) and told["n_steps_held"] == 12
    assert told["report"]["sparsity"] == expected["report"]["sparsity"]
    assert {weight.dtype for weight in first.values()} == {torch.float32}
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "sharded-saved")
    assert alike(loaded.state_dict(), first)


def require_equal(directory, told, first, second, expected, alone):
    n_sparse = sum(entry["sparsity/weights"] > 0 for entry in expected["log"] if "loss" in entry)
    assert told["n_steps_held"] == n_sparse == 12
    assert told["report"]["sparsity"] == expected["report"]["sparsity"]
    assert alike(first, second)
    assert {name: w.shape for name, w in first.items()} == {name: w.shape for name, w in alone.items()}
    for name, weight in first.items():
        assert torch.equal(weight == 0, alone[name] == 0), name
        assert torch.allclose(weight, alone[name], atol=1e-4), name
    assert is_complete(directory / "sharded-saved")
    loaded = AutoModelForSequenceClassification.from_pretrained(directory / "sharded-saved")
    assert alike(loaded.state_dict(), first)


def require_whole_checkpoint(folder, alone_at):
    """The weights are there whole and once, and masked as one process's are."""
    state = load_file(folder / "model.safetensors")
    expected = load_file(alone_at / "model.safetensors")
    assert {name: w.shape for name, w in state.items()} == {name: w.shape for name, w in expected.items()}
    for name, weight in state.items():
        assert torch.equal(weight == 0, expected[name] == 0), name
    assert len(list(folder.glob("*.safetensors"))) == 2, "weights and masks"
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert alike(model.state_dict(), state)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"schedule": {**RECIPE["schedule"], "shrink": "when_final"}}, "write shrink: at_end, or train under"),
        ({"schedule": {**RECIPE["schedule"], "rewind": 0.1}}, "schedule.rewind remembers whole weights; drop it, or"),
        (
            {"prune": [{"target": "weights", "sparsity": 0.5, "criterion": "movement"}]},
            "prune.0.criterion: movement gathers whole weights and gradients at each step; take taylor",
        ),
    ],
    ids=["when_final", "rewind", "movement"],
)
def test_what_needs_whole_parameters_is_refused_at_the_start(tmp_path, recipe, said):
    spec = {**OPTIONS, "recipe": {**OPTIONS["recipe"], **recipe}, "training": {**OPTIONS["training"], **SHARDED}}
    done = attempt(JOB, tmp_path, "refused", json.dumps(spec), n_processes=2)
    assert done.returncode == 1 and said in done.stderr, done.stderr[-4000:]
    assert not list(tmp_path.glob("refused/*"))
