"""The card of a pruned model: what the Hub accepts, what a reader needs, nothing that nobody measured."""

import json

import pytest
import yaml
from huggingface_hub import ModelCard

import hf_prune
from hf_prune.report.card import for_repository, render_card
from hf_prune.structure.inputs import example_inputs
from tests import zoo
from tests.hub_metadata import check_card


STEPS = [{"target": "layers", "remove": [1]}, {"target": "ffn_neurons", "sparsity": 0.5, "scope": "global"}]
MEASURED = {
    "metrics": {"dense": {"accuracy": 0.75, "loss": 0.5}, "pruned": {"accuracy": 0.7, "loss": float("nan")}},
    "latency_ms": {"dense": {"1": 3.0}, "pruned": {"1": 2.0}},
    "bytes_on_disk": {"dense": 2000, "pruned": 1000},
}


@pytest.fixture(scope="module")
def report():
    model = zoo.build("bert")
    made = hf_prune.prune_(model, {"version": 1, "prune": STEPS}, calibration=[example_inputs(model)])
    return made.to_dict()


def card(report, base_model=None, recipe=None, **metadata):
    recipe = recipe or hf_prune.Recipe.from_dict(report["recipe"]).to_yaml()
    return render_card(json.loads(json.dumps(report)), recipe, base_model=base_model, metadata=metadata)


def header(text):
    return yaml.safe_load(text.split("---\n")[1])


def test_everything_that_is_known_is_there_and_the_hub_accepts_it(report):
    text = card(
        {**report, "measured": MEASURED},
        base_model="owner/base",
        license="apache-2.0",
        language=["en", "de"],
        datasets=["owner/data"],
        pipeline_tag="text-classification",
        dataset={"type": "owner/data", "name": "Data", "split": "test"},
        repo_id="me/small",
    )
    assert check_card(text) == ([], [])
    parsed = ModelCard(text).data  # huggingface_hub's own reading of it
    assert [(each.metric_name, each.dataset_split) for each in parsed.eval_results] == [
        ("accuracy", "test"),
        ("accuracy of the dense model", "test"),
    ]
    head = header(text)
    assert head["base_model"] == "owner/base" and head["base_model_relation"] == "finetune"
    assert head["license"] == "apache-2.0" and head["language"] == ["en", "de"] and head["datasets"] == ["owner/data"]
    result = head["model-index"][0]["results"][0]
    assert result["task"]["type"] == "text-classification" and result["dataset"]["split"] == "test"
    metrics = [(metric["type"], metric["name"], metric["value"]) for metric in result["metrics"]]
    both = [("accuracy", "accuracy", 0.7), ("accuracy", "accuracy of the dense model", 0.75)]
    assert metrics == both, "NaN is no metric"
    assert "| accuracy | 0.75 | 0.7 | -0.05 |" in text and "| loss | 0.5 | - |" in text
    assert "| milliseconds, batch of 1 | 3 | 2 | 1.50× |" in text
    assert "| bytes on disk | 2,000 | 1,000 | -50.0% |" in text
    assert "`owner/base`, pruned with hf_prune: without 1 layer, 4 attention heads, 96 feed-forward neurons." in text
    assert 'from_pretrained("me/small", trust_remote_code=True)' in text
    assert "AutoModelForSequenceClassification" in text and "import hf_prune" in text


def test_metrics_of_the_pruned_model_alone_claim_no_comparison(report):
    text = card({**report, "measured": {"metrics": {"pruned": {"accuracy": 0.7}}}})
    assert "| accuracy | - | 0.7 |  |" in text and "Measured on the same data" not in text


BY_PART = {
    "of": "class",
    "metric": "accuracy",
    "n_samples": {"cats": 40, "a|b": 1, "new": 2},
    "dense": {"cats": 0.75, "a|b": 1.0},
    "pruned": {"cats": 0.25, "a|b": 1.0, "new": 0.5},
}


def test_quality_by_class_begins_with_what_lost_most(report):
    text = card({**report, "measured": {**MEASURED, "by_part": BY_PART}})
    table = text.split("## Quality by class")[1].split("<!--")[0]
    assert "The accuracy of each, by class; first what lost most." in table
    rows = [line for line in table.splitlines() if line.startswith("| ") and "dense" not in line]
    assert rows == ["| cats (40 samples) | 0.75 | 0.25 | -0.5 |", "| a\\|b (1 sample) | 1 | 1 | +0 |"]
    assert "by class or domain was not measured" not in text
    assert "by class or domain was not measured" in card({**report, "measured": MEASURED})
    said = str(hf_prune.PruningReport({**report, "measured": {**MEASURED, "by_part": BY_PART}}))
    assert "by class, accuracy where it got worst (samples): cats 0.75 → 0.25 (40); a|b 1 → 1 (1); of 2" in said


def test_many_domains_are_cut_at_those_that_lost_most(report):
    names = [f"d{number}" for number in range(30)]
    values = {name: 10.0 + number for number, name in enumerate(names)}
    parts = {"of": "domain", "metric": "perplexity", "n_samples": dict.fromkeys(names, 5)}
    parts |= {"dense": dict.fromkeys(names, 10.0), "pruned": values}
    text = card({**report, "measured": {"by_part": parts}})
    table = text.split("## Quality by domain")[1].split("<!--")[0]
    assert "The perplexity of each, by domain; first what lost most, 20 of 30." in table
    assert "| d29 (5 samples) | 10 | 39 | +29 |" in table and "| d9 " not in table and table.count(" samples)") == 20


def test_what_left_is_counted(report):
    text = card(report)
    assert "| layers | 1 | 3 | 2 | 33.3% |" in text
    assert "| attention heads | 3 | 12 | 8 | 33.3% |" in text, "the heads of the dropped layer left too"
    assert "| feed-forward neurons | 3 | 144 | 48 | 66.7% |" in text
    assert "What a dropped layer held counts as removed." in text
    assert "| ffn_neurons | `bert.encoder.layer.1` | 48 | 0 | all, with its layer |" in text


def test_what_was_not_measured_is_not_there_and_that_is_said(report):
    text = card(report)
    for title in ("## Quality", "## Speed", "## Estimated", "model-index"):
        assert title not in text
    assert "No metric was recorded" in text and "Speed was not measured" in text
    assert "×" not in text.replace("input 1 × ", "")


@pytest.mark.parametrize("base_model", ["./model", "/home/ada/model", "package:some/model", "a/b/c"])
def test_a_base_model_that_is_not_on_the_hub_stays_out_of_the_header(report, base_model):
    text = card(report, base_model=base_model)
    assert "base_model" not in header(text) and check_card(text) == ([], [])
    assert "/home" not in text


def test_a_stock_result_needs_nothing_and_says_so():
    model = zoo.build("llama")
    step = {"target": "ffn_neurons", "sparsity": 0.5, "uniform": True}
    made = hf_prune.prune_(model, {"version": 1, "prune": [step]})
    text = card(made.to_dict())
    assert "no plugin and no remote code" in text and "AutoModelForCausalLM.from_pretrained(" in text
    assert "trust_remote_code=True" not in text and "import hf_prune" not in text


def test_a_recipe_can_not_break_out_of_its_block(report):
    text = card(report, recipe="version: 1\n# ```\n# <script>\n")
    assert "````yaml\nversion: 1\n# ```\n# <script>\n````" in text


def test_the_examples_name_the_repository_once_it_is_known(report):
    text = card(report)
    assert text.count('"path/or/repo"') == 2
    there = for_repository(text, "me/small")
    assert "path/or/repo" not in there and there.count('from_pretrained("me/small"') == 2
    assert for_repository(there, "other/name") == there
