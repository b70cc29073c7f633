"""README.md: every command and snippet runs, what it shows agrees with itself and with the project."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, TrainingArguments

from hf_prune.job.sources import resolve
from hf_prune.recipe import Recipe
from hf_prune.recipe.mistakes import LATER
from tests import zoo
from tests.docs.pages import PAGES, README, ROOT, blocks, sections
from tests.hub_server import HubServer
from tests.processes import python
from tests.training.data import Tokens


COMMANDS = dict.fromkeys(
    line.split(" #")[0].strip()
    for page in PAGES
    if page.name != "sharing.md"  # whose commands follow one another: tests/docs/test_sharing_page.py
    for block in blocks(page)
    if block.language in ("bash", "sh", "shell", "console")
    for line in block.text.splitlines()
    if line.strip() and not line.startswith("#")
)
# They make an environment and take minutes: run by CI itself, and by the tests of the scripts.
SCRIPTS = ("./scripts/quickstart.sh", "./scripts/test.sh")
# What is appended so that a command takes seconds: everything happens, on a tiny model, or nothing is read but a config.
SHORTER = {
    "hf-prune run recipes/quickstart.yaml": ["--smoke", "schedule.updates=2"],
    "hf-prune run recipes/quickstart.yaml prune.2.sparsity=0.3": ["--plan-only"],
    "hf-prune sensitivity HuggingFaceTB/SmolLM2-135M --data texts.txt": [
        "data.max_length=8",
        "--sparsity",
        "0.5",
        "--target",
        "layers",
    ],
    "hf-prune sensitivity HuggingFaceTB/SmolLM2-135M --data texts.txt --target ffn_neurons --json sensitivity.json": [
        "data.max_length=8"
    ],
}
# The exact words of what a command has to print.
SAYS = {
    "validate": "is a good recipe",
    "recipes": "quickstart",
    "inspect": "ffn_neurons",
    "run": ("the recipe works", "loads with"),
    "sensitivity": "rise of the loss",
    "report": "verified on",
    "push": "/ada/minilm-bbc-pruned",
}


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_commands(command, stage, cli, monkeypatch):
    program, *arguments = shlex.split(stage.fit(command))
    if program in SCRIPTS and not arguments:
        path = ROOT / program
        assert os.access(path, os.X_OK)
        assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
        return
    if command.startswith("python -m pytest "):
        assert all((ROOT / argument).is_file() for argument in arguments[2:])  # what CI runs, or all with --full
        return
    if command.endswith("--no-build-isolation deepspeed"):
        return  # minutes of compiling: those tests skip without it
    if command == "pip install .":
        assert (ROOT / "pyproject.toml").exists()  # the test of the wheel installs it
        return
    if program == "mkdocs":
        # tests/docs/test_site.py builds the site; one that is served never ends
        done = subprocess.run([sys.executable, "-m", "mkdocs", *arguments, "--help"], capture_output=True, check=False)
        assert done.returncode == 0
        assert (ROOT / "mkdocs.yml").exists()
        return
    if program == "python" and arguments[0].startswith("benchmarks/"):
        # they take hours, and tools that aren't here; tests/benchmarks runs them on a tiny model. Here: they take these arguments
        script, *rest = arguments
        monkeypatch.setattr("sys.argv", [script, *rest, "--help"])
        monkeypatch.syspath_prepend(ROOT / "benchmarks")
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        assert stop.value.code == 0
        return
    assert program == "hf-prune", f"no test runs {command!r}: teach this one to"
    arguments += SHORTER.get(
        command, SHORTER["hf-prune run recipes/quickstart.yaml"] if "minilm-half" in command else []
    )
    if arguments[0] in ("report", "push"):
        stage.save_pruned("outputs/quickstart")
    if arguments[0] == "push":
        with HubServer() as server:  # which only a process of its own takes for the Hub
            words = [argument.replace("you/", "ada/") for argument in arguments]
            done = python("-m", "hf_prune", *words, folder=stage.directory, **server.env(stage.directory / "home"))
        code, out, err = done.returncode, done.stdout, done.stderr
    else:
        done = cli(*arguments)
        code, out, err = done.code, done.out, done.err
    assert code == 0, err
    expected = SAYS[arguments[0]]
    assert any(words in out for words in ((expected,) if isinstance(expected, str) else expected)), out


@pytest.mark.parametrize("command", ["hf-prune frobnicate", "python setup.py install", "./scripts/quickstart.sh --x"])
def test_a_command_that_no_test_knows_fails(command, stage, cli, monkeypatch):
    with pytest.raises((AssertionError, KeyError)):
        test_commands(command, stage, cli, monkeypatch)


def test_several_processes_do_one_job(stage):
    """The launch that the prose names: two that know of each other say once that it worked, two jobs would say it twice."""
    (command,) = re.findall(r"`torchrun ([^`]+)`", README.read_text(encoding="utf-8").replace("\n", " "))
    assert "--nproc_per_node 2" in command
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *shlex.split(command), "--smoke", "schedule.updates=2"],
        cwd=stage.directory,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the recipe works") == 1


def test_python(stage):
    """All snippets in the page's order, as one program; the training script that they change has its names already."""
    torch.manual_seed(0)
    model = zoo.build("bert")
    names = {
        "model": model,
        "args": TrainingArguments(
            output_dir="out", max_steps=4, report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True
        ),
        "train": Tokens(),
        "test": Tokens(seed=1),
        "tokenizer": None,
    }
    loaded = []
    for block in (block for block in blocks(README) if block.language == "python"):
        exec(compile(stage.fit(block.text), str(block), "exec"), names)
        loaded += [names["model"]] if "small-classifier" in block.text and ".from_pretrained" in block.text else []
    assert names["trainer"].pruning_report.content["verification"]
    assert names["report"].content["checkpoint"]["loads_with"] == "transformers", (
        "what the page loads without hf_prune"
    )
    small = names["trainer"].model.state_dict()
    assert all(torch.equal(small[name], tensor) for name, tensor in loaded[0].state_dict().items())


def test_the_drop_in_changes_five_lines():
    text = "".join(block.text for block in blocks(README) if block.language == "python")
    assert re.findall(r"# (\d), (?:was|new)", text) == ["1", "2", "3", "4", "5"]


def test_the_recipe_is_accepted(stage):
    recipe = Recipe.from_yaml(stage.directory / "recipe.yaml")
    assert [step.target for step in recipe.prune] == ["attention_heads", "ffn_neurons"]


def quickstart_rows():
    (shown,) = (block for block in blocks(README) if block.text.startswith("BertFor"))
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.text.splitlines() if "│" in line]
    return {
        name: (number(dense), number(pruned), change)
        for name, dense, pruned, change in cells
        if change not in ("", "change")
    }


def number(text):
    return float(text.replace(",", ""))


def test_the_table_agrees_with_itself():
    rows = quickstart_rows()
    assert {"accuracy", "bytes on disk", "latency, batch of 1 (ms)", "latency, batch of 8 (ms)"} <= rows.keys()
    for dense, pruned, change in rows.values():
        if change.endswith("%"):
            assert abs(pruned / dense - 1 - float(change.rstrip("%")) / 100) < 1e-3
        elif change.endswith("× as fast"):
            assert abs(dense / pruned - float(change.split("×")[0])) < 1e-2
        else:
            assert abs(pruned - dense - float(change)) < 1e-4


def test_the_table_is_of_the_quickstart_s_model():
    section = Recipe.from_yaml(ROOT / "recipes" / "quickstart.yaml").model
    config = AutoConfig.from_pretrained(resolve(section.name_or_path, "model"), num_labels=5)
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    dense, pruned, _ = quickstart_rows()["parameters"]
    assert dense == sum(parameter.numel() for parameter in model.parameters())
    assert 0.5 * dense < pruned < dense


def test_every_family_that_is_tested_is_named():
    said = re.sub(r"[^a-z0-9]", "", sections(README)["What is supported"].lower())
    for family in {model_type for model_type, _, _ in zoo.MODELS.values()}:
        assert re.sub(r"[^a-z0-9]", "", family) in said, family


@pytest.mark.parametrize(
    ("word", "key"), [("distillation", "distillation"), ("repair", "compensation"), ("parts of a layer", "part")]
)
def test_what_is_said_to_be_missing_is_missing(word, key):
    (line,) = re.findall(r"^- Not yet: .*$", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert (word in line) == (key in {name for name, _ in LATER})
