"""The benchmarks on a tiny model: what is measured, against plain loops; what is written; what is refused."""

import importlib
import json
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import zoo
from tests.job.inputs import WORDS, text_model


ROOT = Path(__file__).parents[2]
SCRIPTS, PAGE = ROOT / "benchmarks", ROOT / "docs" / "benchmarks.md"
L1 = {"target": "weights", "sparsity": 0.5, "criterion": "l1"}


@pytest.fixture
def scripts(monkeypatch):
    """Imports one of them, with those beside it in reach."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module


@pytest.fixture
def common(scripts, monkeypatch):
    """The protocol, without processes of its own."""
    module = scripts("common")
    monkeypatch.setattr(module, "in_own_process", lambda function, *arguments: function(*arguments))
    return module


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    return text_model(tmp_path / "model", "llama")


def write_text(path, seed, n=1700):
    path.write_text(" ".join(random.Random(seed).choices(WORDS, k=n)), encoding="utf-8")
    return path


@pytest.fixture
def inputs(scripts, model, tmp_path):
    """What quality.py writes: 2 windows of calibration, 3 of evaluation."""
    place = tmp_path / "inputs"
    texts = write_text(tmp_path / "seen.txt", 1), write_text(tmp_path / "held_out.txt", 2)
    scripts("quality").save_inputs(place, str(model), 2, 3, texts)
    return place


def test_inputs_are_the_model_and_its_tokens(inputs, model, tmp_path, common):
    tokens = AutoTokenizer.from_pretrained(model)((tmp_path / "seen.txt").read_text())["input_ids"]
    assert common.calibration_windows(inputs).tolist() == [tokens[:512], tokens[512:1024]]
    tokens = AutoTokenizer.from_pretrained(model)((tmp_path / "held_out.txt").read_text())["input_ids"]
    (held_out,) = common.evaluation_windows(inputs).items()
    assert held_out[0] == "held_out"
    assert held_out[1].flatten().tolist() == tokens[: 3 * 512]
    given, written = load_file(model / "model.safetensors"), load_file(inputs / "model.safetensors")
    assert given.keys() == written.keys()
    assert all(torch.equal(given[name], written[name]) for name in given)
    said = common.describe(inputs, [])
    assert said["windows"] == {"calibration": 2, "held_out": 3}
    assert said["origin"] == {"calibration": "seen.txt", "held_out": "held_out.txt"}


def test_texts_that_are_too_short_are_refused(scripts, model, tmp_path):
    texts = write_text(tmp_path / "seen.txt", 1, 600), write_text(tmp_path / "held_out.txt", 2)
    with pytest.raises(SystemExit, match="give 1 windows of 512 tokens; 2 were asked for"):
        scripts("quality").save_inputs(tmp_path / "inputs", str(model), 2, 3, texts)


def test_figures_of_a_method(scripts, common, inputs):
    """Two texts of unequal size, each token's loss by a plain loop; half of each matrix is zero."""
    texts = common.evaluation_windows(inputs)
    texts["short"] = texts["held_out"].flip(1)[:1]
    common.save_windows(inputs, common.calibration_windows(inputs), texts, {})
    pruned = {}

    def prune(name, model, calibration):
        pruned[name] = scripts("quality").prune({"l1": ("", [L1])}, name, model, calibration)
        return pruned[name]

    row = common.measure("l1", prune, inputs)
    losses = {}
    pruned["l1"].requires_grad_(False)
    for text, windows in texts.items():
        losses[text] = []
        for window in windows:
            logits = pruned["l1"](window[None]).logits[0].double()
            for position in range(1, 512):
                scores = logits[position - 1]
                losses[text].append(float(scores.logsumexp(0) - scores[window[position]]))
    losses["all"] = [loss for text in texts for loss in losses[text]]
    assert row["perplexity"].keys() == losses.keys()
    for text, values in losses.items():
        assert row["perplexity"][text] == pytest.approx(math.exp(sum(values) / len(values)), rel=1e-5)
    assert row["parameters"] == sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(inputs).parameters())
    assert row["zeros"] == 0.5
    assert common.measure("dense", prune, inputs)["zeros"] == 0


def test_a_method_that_fails_is_said_and_the_others_go_on(common, inputs, tmp_path, capsys):
    def prune(name, model, calibration):
        if name == "broken":
            raise ValueError("no such layer\nand more")
        return model

    file = tmp_path / "results" / "figures.json"
    with pytest.raises(SystemExit) as stopped:
        common.measure_all({"broken": {"heading": "a"}, "idle": {"heading": "b"}}, prune, inputs, [], file)
    assert stopped.value.code == 1
    rows = json.loads(file.read_text())["rows"]
    assert list(rows) == ["dense", "broken", "idle"]
    assert rows["broken"] == {"heading": "a", "error": "ValueError: no such layer"}
    assert rows["idle"]["perplexity"] == rows["dense"]["perplexity"]
    common.measure_all({"late": {"heading": "b"}}, prune, inputs, [], file)
    assert list(json.loads(file.read_text())["rows"]) == ["dense", "broken", "idle", "late"]
    assert "1.000×" in capsys.readouterr().out


def test_rows_of_another_run_are_not_mixed(common, inputs, tmp_path):
    file = tmp_path / "figures.json"
    common.measure_all({}, None, inputs, [], file)
    windows = common.calibration_windows(inputs)
    common.save_windows(inputs, windows[:1], common.evaluation_windows(inputs), {"held_out": "", "calibration": ""})
    with pytest.raises(SystemExit, match="different inputs, windows, origin"):
        common.measure_all({}, None, inputs, [], file)


def test_a_package_that_is_missing_is_named(common, inputs):
    with pytest.raises(SystemExit, match="no-such-tool is not installed"):
        common.describe(inputs, ["no-such-tool"])


def run_of(package, rows, **changes):
    dense = {
        "perplexity": {"prose": 20.0, "all": 10.0},
        "parameters": 1000,
        "zeros": 0.0,
        "cpu_seconds": 0,
        "peak_mib": 1,
    }
    origin = {"calibration": "some articles", "prose": "others"}
    windows = {"calibration": 128, "prose": 32}
    run = {
        "inputs": "ab",
        "windows": windows,
        "origin": origin,
        "packages": {package: "1", "transformers": "5"},
        "hardware": "2-core CPU",
    }
    return run | {"rows": {"dense": dense, **rows}} | changes


def test_the_page_sets_the_same_job_side_by_side(scripts, common):
    figures = {"parameters": 900, "zeros": 0.5, "cpu_seconds": 12.4, "peak_mib": 1234.5}
    ours = {"heading": common.WEIGHTS, "steps": [L1], "perplexity": {"prose": 25.0, "all": 15.0}, **figures}
    theirs = {"heading": common.WEIGHTS, "perplexity": {"prose": 30.0, "all": 25.0}, **figures}
    broken = {"heading": common.N_OF_M, "error": "ValueError: 5"}
    runs = [run_of("hf_prune", {"mine": ours}), run_of("tool", {"tool mine": theirs, "tool 2:4": broken})]
    page = scripts("page").page(runs)
    section = page.split("## 50 % of the weights")[1].split("##")[0]
    assert "| hf_prune mine | 1.250× | 1.500× | 900 | 50.0% | 12 | 1,234 |" in section
    assert "| tool mine | 1.500× | 2.500× | 900 | 50.0% | 12 | 1,234 |" in section
    assert "| tool 2:4 | ValueError: 5 |" in page.split("## 2:4")[1]
    assert "| dense, transformers 5 | 20.00 | 10.00 | 1,000 | 0.0% |  |  |" in page
    assert "smoke" not in page
    runs[1]["inputs"] = "cd"
    with pytest.raises(SystemExit, match="don't compare: ab and cd"):
        scripts("page").page(runs)


def test_few_windows_are_called_a_smoke_run(scripts):
    assert "A smoke run" in scripts("page").page([run_of("tool", {}, windows={"calibration": 4, "prose": 4})])


def test_the_page_is_that_of_its_figures(scripts):
    files = [SCRIPTS / "results" / name for name in ("quality.json", "rivals.json", "tried.json")]
    *runs, tried = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    assert scripts("page").page(runs, tried) == PAGE.read_text(encoding="utf-8")


def test_what_was_tried_is_in_a_table_of_its_own_windows(scripts, common):
    row = {"heading": common.TRIED, "steps": [L1], "perplexity": {"prose": 25.0, "all": 15.0}, "parameters": 900}
    figures = {"zeros": 0.0, "cpu_seconds": 12.4, "peak_mib": 1234.5}
    tried = run_of("hf_prune", {"so": row | figures}, inputs="cd", windows={"calibration": 64, "prose": 32})
    page = scripts("page").page([run_of("hf_prune", {})], tried)
    section = page.split("## What else was tried")[1].split("##")[0]
    assert "On 64 windows" in section and "| so | 1.250× | 1.500× | 900 |" in section
    assert f"- so: `{json.dumps([L1])}`" in page


def test_what_was_tried_can_be_tried_again(scripts, common, monkeypatch):
    monkeypatch.setattr(common, "LENGTH", 32)  # of what a model writes itself
    for name, steps in scripts("quality").TRIED.items():
        torch.manual_seed(0)
        model = zoo.build("llama", num_hidden_layers=10)
        before = model.num_parameters()
        scripts("quality").prune(
            {name: ("", steps)}, name, model, [{"input_ids": torch.randint(5, 99, (4, 32))} for _ in range(2)]
        )
        assert model.num_parameters() < before, name


def test_each_method_does_what_its_heading_says(scripts, common):
    n_layers = {common.TENTH_OF_LAYERS: 9, common.FIFTH_OF_LAYERS: 8}
    for name, (heading, steps) in scripts("quality").METHODS.items():
        torch.manual_seed(0)
        model = zoo.build("llama", num_hidden_layers=10)
        size = model.num_parameters()
        batches = [{"input_ids": torch.randint(5, 99, (4, 32))}]
        scripts("quality").prune({name: (heading, steps)}, name, model, batches)
        assert len(model.model.layers) == n_layers.get(heading, 10), name
        if heading in (common.WEIGHTS, common.N_OF_M):
            assert common.share_of_zeros(model) == pytest.approx(0.5, abs=1e-3), name
        else:
            assert model.num_parameters() < size, name


@pytest.mark.slow
def test_as_users_run_them(model, tmp_path):
    """Each method in a process of its own, a recipe file, another sparsity, rows added later, and the page."""
    recipe = tmp_path / "own.yaml"
    recipe.write_text("{version: 1, prune: [{target: layers, sparsity: 0.34, criterion: block_influence}]}")
    texts = (
        "--calibration-text",
        write_text(tmp_path / "seen.txt", 1),
        "--evaluation-text",
        write_text(tmp_path / "b.txt", 2),
    )
    sizes = "--windows", "2", "--eval-windows", "2"
    common = "--model", model, *texts, *sizes, "--inputs", tmp_path / "inputs", "--json", tmp_path / "figures.json"
    run("quality.py", *common, "magnitude", recipe)
    run("quality.py", *common, "--sparsity", "0.25", "magnitude")
    rows = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert list(rows) == ["dense", "magnitude", str(recipe), "magnitude 0.25"]
    assert rows["magnitude"]["zeros"] == 0.5
    assert rows["magnitude 0.25"]["zeros"] == 0.25
    assert rows[str(recipe)]["parameters"] < rows["dense"]["parameters"]
    assert all(row["peak_mib"] >= row["peak_mib_loaded"] > 0 for row in rows.values())
    run("page.py", tmp_path / "figures.json", "--to", tmp_path / "page.md")
    assert "magnitude 0.25" in (tmp_path / "page.md").read_text()
    refused = run("quality.py", *common, "--windows", "3", "magnitude", code=2)
    assert "has 2 windows of calibration, not 3" in " ".join(refused.stderr.replace("│", " ").split())


def run(script, *arguments, code=0):
    command = [sys.executable, SCRIPTS / script, *arguments]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == code, done.stderr
    return done
