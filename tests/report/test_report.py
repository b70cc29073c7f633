"""What a report says is so: counted by hand, measured on the files, and never more than was found out."""

import json
import re

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import hf_prune
from hf_prune.errors import CheckpointError
from hf_prune.job.measure import weight_bytes
from hf_prune.report import PruningReport
from hf_prune.report.build import public_recipe
from hf_prune.structure import inspect_model
from hf_prune.structure.inputs import example_inputs
from tests import zoo


EVERYTHING = [
    {"target": "layers", "remove": [1]},
    {"target": "ffn_neurons", "sparsity": 0.5, "scope": "global"},
    {"target": "attention_heads", "sparsity": 0.25},
    {"target": "weights", "sparsity": 0.4},
]


def pruned(name="bert", steps=EVERYTHING, **options):
    model = zoo.build(name)
    batches = [example_inputs(model, batch_size=2, length=6)]
    return model, hf_prune.prune_(model, {"version": 1, "seed": 7, "prune": steps}, calibration=batches, **options)


@pytest.fixture(scope="module")
def both():
    return pruned()


# --------------------------------------------------------------------------------------------------------------
# counts, by hand


def bert_parameters(d_model, heads, widths, n_vocabulary=99, n_positions=512, n_labels=2, d_head=8):
    embeddings = (n_vocabulary + n_positions + 2) * d_model + 2 * d_model
    layers = sum(
        3 * (d_model * n * d_head + n * d_head) + n * d_head * d_model + d_model  # query, key, value; output
        + d_model * width + width + width * d_model + d_model  # feed-forward
        + 4 * d_model  # two norms
        for n, width in zip(heads, widths, strict=True)
    )  # fmt: skip
    return embeddings + layers + d_model * d_model + d_model + n_labels * d_model + n_labels


def bert_macs(d_model, heads, widths, length, n_labels=2, d_head=8):
    layers = sum(
        length * (4 * d_model * n * d_head + 2 * d_model * width) + 2 * n * length * length * d_head
        for n, width in zip(heads, widths, strict=True)
    )
    return layers + d_model * d_model + n_labels * d_model  # pooler and classifier see one position


def llama_macs(d_model, groups, widths, length, n_vocabulary=99, d_head=8):
    # under grouped-query attention each key/value head has two query heads here
    layers = sum(
        length * (2 * 2 * n * d_head * d_model + 2 * n * d_head * d_model + 3 * d_model * width)
        + 2 * 2 * n * length * length * d_head
        for n, width in zip(groups, widths, strict=True)
    )
    return layers + length * d_model * n_vocabulary


def llama_parameters(d_model, groups, widths, n_vocabulary=99, d_head=8):
    layers = sum(
        2 * 2 * n * d_head * d_model + 2 * n * d_head * d_model + 3 * d_model * width + 2 * d_model
        for n, width in zip(groups, widths, strict=True)
    )
    return 2 * n_vocabulary * d_model + layers + d_model


def test_bert_is_counted_as_by_hand(both):
    model, report = both
    totals = report.to_dict()["totals"]
    heads = [layer.attention.self.query.out_features // 8 for layer in model.bert.encoder.layer]
    widths = [layer.intermediate.dense.out_features for layer in model.bert.encoder.layer]
    assert (len(heads), sum(heads), sum(widths)) == (2, 6, 48)
    assert totals["dense"]["parameters"] == bert_parameters(32, [4] * 3, [48] * 3)
    assert totals["pruned"]["parameters"] == bert_parameters(32, heads, widths)
    assert totals["dense"]["macs"] == bert_macs(32, [4] * 3, [48] * 3, length=6)
    assert totals["pruned"]["macs"] == bert_macs(32, heads, widths, length=6)
    assert totals["macs_of"]["input_ids"] == [1, 6]
    assert totals["pruned"]["bytes"] == 4 * totals["pruned"]["parameters"]


def test_llama_is_counted_as_by_hand():
    model, report = pruned("llama", EVERYTHING[:2])
    totals = report.to_dict()["totals"]
    angles = zoo.rotary_macs(model, 6)
    widths = [layer.mlp.up_proj.out_features for layer in model.model.layers]
    assert sum(widths) == 48
    assert totals["dense"] == {
        "parameters": llama_parameters(32, [2] * 3, [48] * 3),
        "bytes": 4 * llama_parameters(32, [2] * 3, [48] * 3),
        "macs": llama_macs(32, [2] * 3, [48] * 3, length=6) + angles,
    }
    assert totals["pruned"]["parameters"] == llama_parameters(32, [2] * 2, widths)
    assert totals["pruned"]["macs"] == llama_macs(32, [2] * 2, widths, length=6) + angles


def test_bytes_on_disk_are_those_of_the_files(both, tmp_path):
    model, report = both
    for name, options in (("one", {}), ("shards", {"max_shard_size": "20KB"})):
        model.save_pretrained(tmp_path / name, **options)
        files = [path for path in (tmp_path / name).iterdir() if path.suffix == ".safetensors"]
        assert len(files) > 1 if name == "shards" else len(files) == 1
        assert weight_bytes(tmp_path / name) == sum(len(path.read_bytes()) for path in files)
    # the tensors, and no more than the headers beside them
    tensors = report.to_dict()["totals"]["pruned"]["bytes"]
    assert tensors < weight_bytes(tmp_path / "one") < tensors + 10_000


# --------------------------------------------------------------------------------------------------------------
# what left


def test_each_site_says_what_left_it(both):
    model, report = both
    content = report.to_dict()
    sites = {(site["target"], site["name"]): site for site in content["sites"]}
    assert sites.keys() == {(s.target, s.name) for s in inspect_model(zoo.build("bert")).sites if not s.branches}
    assert sites["layers", "bert.encoder.layer"]["removed"] == [1]
    for old, new in ((0, 0), (2, 1)):  # numbers of the kept layers, before and after
        layer = model.bert.encoder.layer[new]
        width, heads = layer.intermediate.dense.out_features, layer.attention.self.query.out_features // 8
        neurons = sites["ffn_neurons", f"bert.encoder.layer.{old}"]
        assert (neurons["n_units"], neurons["n_kept"], len(neurons["removed"])) == (48, width, 48 - width)
        assert sites["attention_heads", f"bert.encoder.layer.{old}.attention.self"]["n_kept"] == heads
    gone = sites["ffn_neurons", "bert.encoder.layer.1"]
    assert gone["n_kept"] == 0 and gone["removed"] == list(range(48))


def test_sparsity_is_of_what_dropped_layers_left(both):
    """Counted on the live model: zeros in its matrices, units that its shapes have lost."""
    model, report = both
    n_zero = n_entries = 0
    for name, module in model.bert.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            n_zero += int((module.weight == 0).sum())
            n_entries += module.weight.numel()
            assert name
    shares = report.to_dict()["sparsity"]
    assert shares == {
        "layers": pytest.approx(1 / 3),
        "ffn_neurons": pytest.approx(1 - 48 / 96),
        "attention_heads": pytest.approx(1 - 6 / 8),
        "weights": pytest.approx(n_zero / n_entries),
    }
    weights = report.to_dict()["weights"]
    assert sum(weight["n_entries"] for weight in weights) == n_entries
    assert sum(weight["n_zero"] for weight in weights) == n_zero


def test_near_ties_are_counted():
    """All neurons score alike: which of them leave is for the index to decide, and that is said."""
    explicit = pruned(steps=[{"target": "ffn_neurons", "remove": {"*": [5]}}])[1]  # no score, no cut
    assert explicit.to_dict()["n_near_ties"] == 0 and "near-ties" not in str(explicit)
    model = zoo.build("bert")
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            layer.intermediate.dense.weight.fill_(1.0)
            layer.intermediate.dense.bias.fill_(1.0)
            layer.output.dense.weight.fill_(1.0)
    tied = hf_prune.prune_(model, {"version": 1, "prune": [{"target": "ffn_neurons", "sparsity": 0.5}]})
    assert tied.to_dict()["n_near_ties"] > 0
    assert re.search(r"near-ties: \d+", str(tied))


# --------------------------------------------------------------------------------------------------------------
# honesty


def test_zeros_are_never_called_a_speed_up():
    model, report = pruned(steps=[{"target": "weights", "pattern": "2:4"}])
    content = report.content
    assert content["totals"]["dense"] == content["totals"]["pruned"]
    content["measured"] = {"latency_ms": {"dense": {"1": 2.0}, "pruned": {"1": 1.0}}}
    printed = str(report)
    assert "faster: no, zeros cost what other numbers cost" in printed
    assert "×" not in printed.split("latency")[1].splitlines()[0]
    report.attach_(model)
    card = model._hf_prune_artifacts["README.md"]
    assert "2.00×" not in card and "Faster: no, zeros cost what other numbers cost" in card


def test_a_smaller_model_may_be_called_faster_where_it_was_measured(both):
    report = PruningReport(json.loads(both[1].to_json()))
    assert "as fast" not in str(report)
    report.content["measured"] = {"latency_ms": {"dense": {"8": 3.0}, "pruned": {"8": 2.0}}}
    assert "1.50× as fast" in str(report)


def test_measured_stands_apart_from_counted_and_estimated(both):
    report = PruningReport(json.loads(both[1].to_json()))
    assert "measured" not in str(report) and "estimated" not in str(report)
    report.content["measured"] = {"metrics": {"dense": {"accuracy": 0.5}, "pruned": {"accuracy": 0.4}}}
    report.content["estimated"] = {"dense": {"energy (J)": 3.0}, "pruned": {"energy (J)": 2.0}}
    printed = str(report)
    assert re.search(r"accuracy +│ +0\.5 │ +0\.4 │ +-0\.1 │", printed), "points, not a percentage of the accuracy"
    assert re.search(r"accuracy +│ +0\.5 │ +0\.4 │ +-0\.1 │", printed), "points, not a percentage of the accuracy"
    assert "dense: the model before pruning" in printed
    report.content["recipe"]["training"] = {"num_train_epochs": 1}
    assert "dense: the same model, trained alike" in str(report)
    assert printed.index("accuracy") < printed.index("estimated") < printed.index("energy (J)")


def test_what_was_not_verified_says_so():
    _, report = pruned(verify=False)
    assert report.to_dict()["verification"] is None
    assert "not verified" in str(report)


def test_it_says_with_what_and_on_what(both):
    content, printed = both[1].to_dict(), str(both[1])
    assert content["seed"] == 7 and content["recipe"]["prune"][0]["remove"] == [1]
    assert content["versions"]["torch"] == torch.__version__ and content["hardware"]["threads"] >= 1
    assert content["seconds"].keys() == {"plan", "shrink", "verify"}
    assert "seed 7" in printed and f"torch {torch.__version__}" in printed and "seconds: plan" in printed


def test_a_local_path_is_not_shared_and_is_no_hub_id(tmp_path):
    zoo.build("bert").save_pretrained(tmp_path / "secret" / "model")
    model = type(zoo.build("bert")).from_pretrained(tmp_path / "secret" / "model")
    report = hf_prune.prune_(model, {"version": 1, "prune": [{"target": "ffn_neurons", "sparsity": 0.5}]})
    assert report.to_dict()["model"]["name_or_path"] == "./model"
    for text in model._hf_prune_artifacts.values():
        assert "secret" not in text and "base_model" not in text


def test_the_recipe_that_is_shared_has_no_path_of_the_machine():
    recipe = hf_prune.Recipe.from_dict(
        {
            "version": 1,
            "model": {"name_or_path": "/home/ada/secret/model", "task": "text-classification"},
            "data": {"name_or_path": "owner/data"},
            "output": {"dir": "~/secret/out"},
            "prune": [{"target": "ffn_neurons", "sparsity": 0.5}],
        }
    )
    shared = public_recipe(recipe)
    assert "secret" not in json.dumps(shared)
    assert (shared["model"]["name_or_path"], shared["output"]["dir"]) == ("./model", "./out")
    assert shared["data"]["name_or_path"] == "owner/data"
    assert hf_prune.Recipe.from_dict(shared).prune == recipe.prune


# --------------------------------------------------------------------------------------------------------------
# the table


def test_alike_sites_share_a_row_and_names_stay_whole():
    _, report = pruned(steps=[{"target": "ffn_neurons", "sparsity": 0.25}, {"target": "weights", "pattern": "2:4"}])
    printed = str(report)
    assert re.search(r"bert\.encoder\.layer\.\{0-2\} +│ +48 │ +36 │ 25\.0%", printed)
    assert re.search(r"bert\.encoder\.layer\.\{0-2\}\.attention\.self\.query\.weight", printed)
    assert all(line == line.rstrip() for line in printed.splitlines())


def test_each_site_that_lost_something_is_in_the_table(both):
    _, report = both
    table = str(report).split("dense and pruned")[0]
    for site in report.to_dict()["sites"]:
        if site["removed"] and site["target"] == "attention_heads" and site["n_kept"]:
            assert ", ".join(map(str, site["removed"])) in table
    assert "all, with its layer" in table


# --------------------------------------------------------------------------------------------------------------
# files


def test_round_trip(both, tmp_path):
    report = both[1]
    text = report.to_json(tmp_path / "pruning_report.json")
    assert json.loads(text) == report.to_dict()
    again = PruningReport.from_json(tmp_path / "pruning_report.json")
    assert again.to_dict() == report.to_dict() and str(again) == str(report)
    assert [path.name for path in tmp_path.iterdir()] == ["pruning_report.json"]
    assert hf_prune.Recipe.from_dict(again.to_dict()["recipe"]).prune[1].sparsity == 0.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no"),
        ('{"format": "hf_prune.report", "vers', "can't be read"),
        ("\xff", "is no report|can't be read"),
        ("[]", "is no report of hf_prune"),
        ('{"format": "other", "version": 1}', "is no report of hf_prune"),
        ('{"format": "hf_prune.report", "version": 2}', r"has version 2; this reads 1\. Upgrade hf_prune"),
        ('{"format": "hf_prune.report", "version": 1}', "lacks"),
        ('{"format": "hf_prune.report"}', "version"),
    ],
)
def test_a_file_that_is_no_report_is_refused(tmp_path, text, message):
    path = tmp_path / "pruning_report.json"
    if text is not None:
        path.write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=message):
        PruningReport.from_json(path)
