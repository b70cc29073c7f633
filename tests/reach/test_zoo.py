"""Every model type that the zoo says it builds: its output is finite and depends on the input, without a network."""

from __future__ import annotations

import gc
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.reach.shrinking import FIRST_WORD, WORDS
from tests.reach.turn import turn
from tests.reach.zoo import REASONS, Built, NotBuildable, base_types, build, model_types
from tests.zoo import is_before


BUILT = [model_type for model_type in model_types() if model_type not in REASONS]
N_SLICES = 150
SLICE = BUILT[turn() % N_SLICES :: N_SLICES]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the zoo opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def float_tensors(value: Any) -> Iterator[torch.Tensor]:
    """All floating tensors of an output, however nested."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point() or value.is_complex():
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from float_tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from float_tensors(item)


def output(model: PreTrainedModel, inputs: dict[str, Any]) -> list[torch.Tensor]:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # some draw what they mask or start from
        return list(float_tensors(model(**inputs)))


def changed(inputs: dict[str, Any]) -> dict[str, Any]:
    """Other numbers, and other words in the same places; masks, sizes and special tokens stay."""
    generator = torch.Generator().manual_seed(7)
    other = dict(inputs)
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            other[name] = value + torch.randn(value.shape, generator=generator)
        elif name.endswith("input_ids"):
            words = (value >= FIRST_WORD) & (value < WORDS)
            other[name] = value.clone()
            other[name][words] = value[words].roll(1)
    return other


def mistakes(built: Built) -> str:
    """What is wrong with a model and its inputs, empty if nothing is."""
    before, after = output(built.model, built.inputs), output(built.model, changed(built.inputs))
    if not before:
        return "no output"
    if not all(torch.isfinite(tensor).all() for tensor in before):
        return "output isn't finite"
    pairs = list(zip(before, after, strict=True))
    if all(one.shape == other.shape and torch.equal(one, other) for one, other in pairs):
        return "output doesn't depend on the input"
    training, dtypes = built.model.training, {parameter.dtype for parameter in built.model.parameters()}
    return "" if not training and dtypes == {torch.float32} else f"training is {training}, dtypes are {dtypes}"


@pytest.mark.parametrize("model_type", SLICE)
def test_output_is_finite_and_depends_on_the_input(model_type: str) -> None:
    assert mistakes(build(model_type)) == ""


@pytest.mark.slow
def test_every_type_is_built_or_has_a_reason() -> None:
    found = {}
    for model_type in BUILT:
        try:
            found[model_type] = mistakes(build(model_type))
        except Exception as error:  # all of them in one report
            found[model_type] = f"{type(error).__name__}: {error}"
        gc.collect()
    assert {model_type: mistake for model_type, mistake in found.items() if mistake} == {}


def test_what_is_not_built_says_why() -> None:
    refused = sorted(set(REASONS) & set(model_types()))
    for model_type in refused:
        with pytest.raises(NotBuildable, match=model_type):
            build(model_type)
    assert all(len(REASONS[model_type]) > 10 for model_type in refused)


@pytest.mark.skipif(is_before("5.23"), reason="of the 605 of Transformers 5.23")
def test_at_least_580_of_the_types_of_automodel() -> None:
    assert len(set(base_types()) & set(BUILT)) >= 580


def test_a_seed_gives_the_same_weights_and_inputs() -> None:
    one, same, other = build("qwen2_vl"), build("qwen2_vl"), build("qwen2_vl", seed=1)
    for mine, its in ((one.model.state_dict(), same.model.state_dict()), (one.inputs, same.inputs)):
        assert mine.keys() == its.keys()
        assert all(torch.equal(mine[name], its[name]) for name in mine)
    weight = "lm_head.weight"
    assert not torch.equal(one.model.state_dict()[weight], other.model.state_dict()[weight])
    assert not torch.equal(one.inputs["pixel_values"], other.inputs["pixel_values"])


def test_each_commit_takes_another_slice_and_all_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_RUN_NUMBER", "7")
    assert turn.__wrapped__() == 7
    monkeypatch.delenv("GITHUB_RUN_NUMBER")
    assert turn.__wrapped__() == turn.__wrapped__() >= 0
    slices = [BUILT[number::N_SLICES] for number in range(N_SLICES)]
    assert sorted(name for each in slices for name in each) == BUILT
