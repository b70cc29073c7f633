"""A sample of types goes through the proof, and a proof of something wrong fails. All types: `python scripts/support.py`."""

from zlib import crc32

import pytest
import torch

from hf_prune import pipeline
from hf_prune.errors import VerificationError
from tests.reach import page, proof, results
from tests.reach.census import census, reviewed
from tests.reach.turn import turn
from tests.reach.zoo import build, model_types
from tests.zoo import is_before


of_the_newest = pytest.mark.skipif(is_before("5.23"), reason="the page is of Transformers 5.23")
SAMPLE = ("bert", "modernbert", "mixtral")
TYPES = sorted(census()["types"])
LONGER = [name for name in TYPES if name not in SAMPLE and crc32(name.encode()) % 20 == 7]
RESULTS = results.read()
N_SLICES = 300
SLICE = TYPES[turn() % N_SLICES :: N_SLICES]


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


@pytest.mark.parametrize("model_type", SLICE)
def test_a_rotating_slice_is_at_least_what_the_support_page_says(model_type):
    subject = proof.Subject.of(build(model_type), quick=True)
    held, order = reviewed(model_type), results.ORDER
    for target, said in RESULTS[model_type].outcomes.items():
        outcome = proof.prove(subject, target, "global", held)
        assert order.index(results.word(outcome)) >= order.index(results.word(said)), f"{target}: {outcome}"


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
        ("clvp", "ffn_neurons"),  # gate and up inside of what its feed-forward calls its first layer
        ("resnet", "weights"),  # convolutions alone
        ("encodec", "weights"),  # under weight normalisation
        ("ibert", "weights"),  # linear layers of its own class
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
    real = pipeline.remove_masked_

    def faulty(model, *arguments):
        record = real(model, *arguments)
        weight = model.model.layers[1].mlp.down_proj.weight
        weight.data = weight.data.roll(1, 1)
        return record

    monkeypatch.setattr(pipeline, "remove_masked_", faulty)
    assert "VerificationError" in prove(llama)
    monkeypatch.setattr(pipeline, "verify_models", lambda *arguments: None)
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


@pytest.mark.parametrize(
    ("model_type", "target", "why"),
    [
        ("mra", "attention_heads", "nothing is verified"),  # without its CUDA kernels its attention gives zeros
        (
            "big_bird",
            "attention_heads",
            "set_attention_type",
        ),  # a short text makes it put another attention in its place
        ("squeezebert", "layers", "by their forward alone"),  # hooks don't see them
    ],
)
def test_what_passed_while_wrong_is_refused(model_type, target, why):
    subject = proof.Subject.of(build(model_type), quick=True)
    outcome = proof.prove(subject, target, "global", reviewed(model_type))
    assert outcome.startswith("refused") and why in outcome


@pytest.mark.parametrize("model_type", ["diffllama", "esmc"])
def test_layers_with_numbers_that_follow_from_the_depth_are_loaded_as_they_were(model_type):
    subject = proof.Subject.of(build(model_type))
    assert subject.can["save"] and proof.prove(subject, "layers", "global", reviewed(model_type)) == "proven"


def test_outputs_leave_out_what_has_an_entry_for_each_layer_or_head():
    class Model(torch.nn.Module):
        def forward(self, x):
            return {"logits": x, "hidden_states": (x, x), "text": {"state": x + 1, "attentions": (x,)}, "loss": x}

    given = proof.outputs(Model(), {"x": torch.ones(1)})
    assert [tensor.item() for tensor in given] == [1.0, 2.0]


def row(**outcomes):
    said = dict.fromkeys(proof.TARGETS, "proven") | {
        name.replace("_of_", "."): said for name, said in outcomes.items()
    }
    return results.Row("2026-01-02 03:04", "new", ["global"], said)


def test_the_page_counts_over_the_census():
    rows = {
        "bert": row(),
        "llama": row(layers="refused: a_b", weights="WRONG: *"),
        "other": results.Row("2025-01-02 03:04", "old", ["global"], {}, "why"),
    }
    text = page.text(rows)
    assert "2 rows are of the newest sources, 1 of older ones: tried 2025-01-02 03:04 to 2025-01-02 03:04." in text
    assert "| `ffn_neurons` | 2 | 2 (100 %) | 0 | 0 |" in text
    assert "| `layers` | 2 | 1 (50 %) | 1 | 0 |" in text
    assert "| `weights` | 2 | 1 (50 %) | 0 | 1 |" in text
    assert "| llama | ✓ | ✓ | refused 1 | ✓ | ✓ | wrong 2 |" in text
    assert "1. a\\_b\n2. \\*\n" in text
    assert "- other: why" in text


def test_a_part_of_a_run_replaces_its_rows_alone(tmp_path):
    file = tmp_path / "results.json"
    results.write({"llama": row(), "bert": row()}, file)
    newer = results.Row("2026-02-03 04:05", "newer", ["global"], {"layers": "refused: why"})
    results.put("bert", newer, file)
    assert results.read(file) == {"bert": newer, "llama": row()}
    lines = file.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 4 and lines[1].startswith('"bert": ') and lines[2].startswith('"llama": ')


def test_the_worst_of_the_scopes_counts():
    assert results.worst(["proven", "refused: why", "none"]) == "refused: why"
    assert results.worst(["refused: why", "WRONG: what"]) == "WRONG: what"


@of_the_newest
def test_the_kept_results_are_of_all_types_and_are_what_the_page_shows():
    assert RESULTS.keys() == set(model_types())
    assert page.PAGE.read_text(encoding="utf-8") == page.text(RESULTS)
