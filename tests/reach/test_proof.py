"""A sample of types goes through the proof, and a proof of something wrong fails. All types: `python scripts/support.py`."""

from zlib import crc32

import pytest
import torch

from hf_prune.errors import VerificationError
from tests.reach import page, proof
from tests.reach.census import census, reviewed
from tests.reach.zoo import build


SAMPLE = ("bert", "modernbert", "mixtral")
TYPES = sorted(census()["types"])
LONGER = [name for name in TYPES if name not in SAMPLE and crc32(name.encode()) % 20 == 7]


@pytest.mark.parametrize("model_type", [*SAMPLE, *(pytest.param(name, marks=pytest.mark.slow) for name in LONGER)])
def test_what_is_held_is_proven_or_refused(model_type):
    subject = proof.Subject.of(build(model_type))
    outcomes = {
        (target, scope): proof.prove(subject, target, scope, reviewed(model_type))
        for target in proof.TARGETS
        for scope in proof.SCOPES
    }
    assert not {key: outcome for key, outcome in outcomes.items() if outcome.startswith("WRONG")}
    assert outcomes["weights", "global"].startswith("proven")


@pytest.mark.parametrize(
    ("model_type", "target"),
    [
        ("luke", "attention_heads"),  # further queries
        ("lxmert", "attention_heads"),  # a width under the name of a head's size
        ("nystromformer", "attention_heads"),  # a convolution with a channel for each head
        ("inkling_text", "attention_heads"),  # depthwise convolutions of keys and values
        ("gemma3n_audio", "attention_heads"),  # a module inside that counts heads
        ("cvt", "layers"),  # stacks that are sequences
        ("mamba2", "layers"),  # neither attention nor feed-forward
        ("timesfm", "ffn_neurons"),
    ],
)
def test_what_models_do_each_in_its_own_way(model_type, target):
    subject = proof.Subject.of(build(model_type), quick=True)
    assert proof.prove(subject, target, "global", reviewed(model_type)).startswith("proven")


@pytest.fixture(scope="module")
def llama():
    return proof.Subject.of(build("llama"), quick=True)


def prove(subject, target="ffn_neurons", held=None):
    return proof.prove(subject, target, "layer", held or reviewed("llama"))


def test_of_a_smaller_model_that_computes_something_else(llama, monkeypatch):
    real = proof.remove_masked_

    def faulty(model, **options):
        record = real(model, **options)
        weight = model.model.layers[1].mlp.down_proj.weight
        weight.data = weight.data.roll(1, 1)
        return record

    monkeypatch.setattr(proof, "remove_masked_", faulty)
    assert "VerificationError" in prove(llama)
    monkeypatch.setattr(proof, "verify", lambda *arguments: None)
    assert prove(llama) == "WRONG: masked and smaller model differ"


def test_of_an_estimate_that_is_off_by_one(llama, monkeypatch):
    real = proof.parameter_costs

    def off(*arguments):
        costs = real(*arguments)
        return type(costs)(costs.total + 1, costs.per_unit)

    monkeypatch.setattr(proof, "parameter_costs", off)
    assert prove(llama).startswith("WRONG: ") and "estimated" in prove(llama)


def test_of_what_is_left_out_in_silence(llama):
    held = {**reviewed("llama"), "feed_forward": ["model.layers.*.mlp", "tower.layers.*.mlp"]}
    assert prove(llama, held=held) == "WRONG: proven, but it leaves out in silence: tower.layers.*.mlp"


def test_of_an_error_of_someone_else_and_of_a_refusal_that_changed_the_model(llama, monkeypatch):
    def breaks(*arguments, **options):
        raise ZeroDivisionError("by zero")

    def changes(model, *arguments, **options):
        with torch.no_grad():
            model.lm_head.weight[0, 0] += 1
        raise VerificationError("no")

    monkeypatch.setattr(proof, "make_plan", breaks)
    assert prove(llama) == "WRONG: ZeroDivisionError: by zero"
    monkeypatch.setattr(proof, "make_plan", changes)
    assert prove(llama) == "WRONG: refused, but the model changed: no"


def test_the_page_counts_over_the_census():
    bert, llama = reviewed("bert"), reviewed("llama")
    outcomes = {f"{target} {scope}": "proven" for target in proof.TARGETS for scope in proof.SCOPES}
    rows = {
        "bert": {"type": "bert", "census": bert, "outcomes": outcomes},
        "llama": {
            "type": "llama",
            "census": llama,
            "outcomes": outcomes | {"layers global": "refused: a_b", "weights layer": "WRONG: *"},
        },
        "other": {"type": "other", "outcomes": {}, "not built": "why"},
    }
    text = page.text(rows)
    assert "| `ffn_neurons` | 2 | 2 (100 %) | 0 | 0 |" in text
    assert "| `layers` | 2 | 1 (50 %) | 1 | 0 |" in text
    assert "| `weights` | 2 | 1 (50 %) | 0 | 1 |" in text
    assert "| llama | ✓ | ✓ | refused 1 | ✓ | ✓ | wrong 2 |" in text
    assert "1. a\\_b\n2. \\*\n" in text
    assert "- other: why" in text
