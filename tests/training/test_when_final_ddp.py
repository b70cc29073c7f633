"""`schedule.shrink: when_final` under DistributedDataParallel: two processes by torchrun over gloo."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.processes import launch
from tests.training.job import NO_DROPOUT, recipe


train = partial(launch, Path(__file__).with_name("job.py"))
OPTIONS = {"model": NO_DROPOUT, "training": {"weight_decay": 0.1, "max_grad_norm": 0.1}}


def trained(directory, name, shrink, n_processes=2, **options):
    """Log, report, and by rank the weights and the optimizer's state that a run ended with."""
    more = {**OPTIONS, **options, "training": {**OPTIONS["training"], **options.get("training", {})}}
    train(directory, name, json.dumps({"recipe": recipe(shrink), **more}), n_processes=n_processes)
    return ended(directory, name, n_processes)


def ended(directory, name, n_processes=2):
    told = json.loads((directory / f"{name}.json").read_text())
    weights = [load_file(directory / f"{name}-rank{rank}.safetensors") for rank in range(n_processes)]
    states = [torch.load(directory / f"{name}-rank{rank}.optimizer.pt") for rank in range(n_processes)]
    return told, weights, states


def losses(told):
    return [entry["loss"] for entry in told["log"] if "loss" in entry]


def alike(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def same_moments(a, b):
    a, b = a["state"], b["state"]
    return a.keys() == b.keys() and all(torch.equal(a[n][key], b[n][key]) for n in a for key in a[n])


@pytest.mark.slow
def test_two_processes_shrink_on_the_way_and_go_on_as_the_masked_run(tmp_path):
    told, weights, states = trained(
        tmp_path, "small", "when_final", training={"save_strategy": "steps", "save_steps": 6}
    )
    masked, _, _ = trained(tmp_path, "masked", "at_end")
    ours, theirs = losses(told), losses(masked)
    assert len(ours) == 32 and ours[:8] == theirs[:8] and ours[8:] != ours[:24]
    assert max(abs(a - b) for a, b in zip(ours[8:28], theirs[8:28], strict=True)) < 1e-4
    assert told["report"]["measured"]["step_seconds"]["n_shrunk"] == 24
    assert alike(*weights), "gradients are averaged after the shrink too"
    assert same_moments(*states)
    # and as one process with the same batches, but for the order of sums
    alone, (by_one,), _ = trained(tmp_path, "alone", "when_final", n_processes=1)
    assert losses(alone) == pytest.approx(ours, abs=1e-3)
    assert {name: w.shape for name, w in by_one.items()} == {name: w.shape for name, w in weights[0].items()}

    for step in (6, 12):  # before the shrink, and after it
        options = {"resume": str(tmp_path / "small" / f"checkpoint-{step}")}
        _, resumed, moments = trained(tmp_path, f"from-{step}", "when_final", **options)
        assert alike(resumed[0], weights[0]) and alike(resumed[1], weights[0]), step
        assert same_moments(moments[0], states[0]), step
