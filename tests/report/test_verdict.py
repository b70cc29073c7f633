"""The verdict says what is so: checked against what really loads, and what really left."""

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import hf_prune
from hf_prune.report.verdict import ENGINES, verdict
from tests import zoo


NEURONS = {"target": "ffn_neurons", "sparsity": 0.34, "criterion": "l2"}


def report_of(name, *steps, **options):
    model = zoo.build(name)
    return model, hf_prune.prune_(model, {"version": 1, "prune": list(steps)}, **options)


def test_a_stock_checkpoint_is_served_by_what_serves_the_dense_model(tmp_path):
    model, report = report_of("llama", NEURONS | {"uniform": True, "round_to": 32})
    said = report.to_dict()["verdict"]
    assert said["loads"].startswith("loads with transformers: ")
    assert said["served_by"] == "served by: whatever serves the dense LlamaForCausalLM, since it is a stock checkpoint"
    model.save_pretrained(tmp_path)
    assert "hf_prune" not in (tmp_path / "config.json").read_text()
    AutoModelForCausalLM.from_pretrained(tmp_path)


def test_widths_that_engines_handle_badly_are_named():
    model, report = report_of("llama", NEURONS | {"sparsity": 0.3, "uniform": True})
    (width,) = {layer.mlp.down_proj.in_features for layer in model.model.layers}
    assert width % 32
    said = report.to_dict()["verdict"]
    assert f"llama.cpp quantises widths that 32 divides, and {width} is none" in said["served_by"]
    assert (f"({width} doesn't)" in said["faster"]) == bool(width % 8)


def test_unequal_sizes_need_hf_prune_and_say_which_engines_take_them(tmp_path):
    model, report = report_of("bert", NEURONS | {"scope": "global"})
    said = report.to_dict()["verdict"]
    assert said["loads"].startswith("loads with hf_prune, or trust_remote_code=True where it isn't installed: ")
    able, _, unable = said["served_by"].partition("; not ")
    for engine in ENGINES:
        assert (engine.name in able, engine.name in unable) == (engine.takes_manifest, not engine.takes_manifest)
    model.save_pretrained(tmp_path)
    AutoModelForSequenceClassification.from_pretrained(tmp_path, trust_remote_code=True)


def test_llama_cpp_takes_sizes_by_layer_of_the_llama_layout_but_no_parts():
    able = report_of("llama", NEURONS | {"scope": "global"})[1].to_dict()["verdict"]["served_by"]
    assert "llama.cpp (`hf-prune export --format gguf`" in able.partition("; not ")[0]
    part = {"target": "layers", "part": "attention", "remove": [1]}
    assert (
        "llama.cpp (sizes that" in report_of("llama", part)[1].to_dict()["verdict"]["served_by"].partition("; not ")[2]
    )


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_zeros_are_no_gain(pattern):
    step = {"target": "weights", "criterion": "l1", "pattern": pattern}
    step |= {"sparsity": 0.5} if pattern == "unstructured" else {}
    said = report_of("llama", step)[1].to_dict()["verdict"]
    assert said["faster"].startswith("faster: no, zeros cost what other numbers cost")


def test_a_masked_model_is_no_faster_until_it_is_shrunk():
    _, masked = report_of("bert", NEURONS, shrink=False)
    _, shrunk = report_of("bert", NEURONS)
    assert "masked and still computed" in masked.to_dict()["verdict"]["faster"]
    totals = shrunk.content["totals"]
    share = 1 - totals["pruned"]["macs"] / totals["dense"]["macs"]
    assert f"by {share:.1%} of the MACs" in shrunk.to_dict()["verdict"]["faster"]


def test_measured_times_are_quoted():
    _, report = report_of("bert", NEURONS)
    report.content["measured"]["latency_ms"] = {"dense": {"1": 3.0, "8": 8.0}, "pruned": {"1": 2.0, "8": 5.0}}
    assert "measured 1.50× at batch 1, 1.60× at batch 8" in report.to_dict()["verdict"]["faster"]


def test_all_lines_are_in_report_and_card(tmp_path):
    model, report = report_of("bert", NEURONS | {"scope": "global"})
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    for line in report.to_dict()["verdict"].values():
        assert line in str(report)
        assert line[1:] in card
    assert hf_prune.PruningReport.from_json(tmp_path / "pruning_report.json").to_dict() == report.to_dict()


def test_nothing_is_said_without_a_checkpoint():
    assert verdict({"checkpoint": None}) == {}
