"""The page about sharing, done in its order: each snippet and each command, against a Hub on loopback."""

from __future__ import annotations

import shlex
from importlib.util import find_spec

from typer.testing import CliRunner

import hf_prune
from hf_prune.cli.main import app
from hf_prune.errors import PruneError
from hf_prune.export.runtimes import RUNTIMES
from tests import zoo
from tests.docs.pages import ROOT, blocks, sections, table
from tests.hub.conftest import api, hub  # noqa: F401 - fixtures


PAGE = ROOT / "docs" / "sharing.md"


def test_all_of_it_in_order(hub, api, stage):  # noqa: F811
    stage.save_pruned("outputs/quickstart")
    llama = zoo.build("llama")
    hf_prune.prune_(llama, {"version": 1, "prune": [{"target": "ffn_neurons", "sparsity": 0.5, "scope": "global"}]})
    llama.save_pretrained(stage.directory / "outputs" / "llama")
    zoo.build("bert").push_to_hub("ada/base", private=False)
    names: dict = {}
    for block in blocks(PAGE):
        text = stage.fit(block.text).replace("me/", "ada/")
        if block.language == "python":
            exec(compile(text, str(block), "exec"), names)
            continue
        for line in text.splitlines():
            program, *words = shlex.split(line)
            assert program == "hf-prune"
            done = CliRunner().invoke(app, words)
            missing = [package for package in RUNTIMES["onnx"].packages if find_spec(package) is None]
            if "onnx" in words and missing:
                assert isinstance(done.exception, PruneError) and missing[0] in str(done.exception)
            else:
                assert done.exit_code == 0, (line, done.output, done.exception)
    assert {ref.name for ref in api.list_repo_refs("ada/minilm-pruned").branches} == {"main", "draft"}
    assert "pruning_plan.json" in api.list_repo_files("ada/minilm-plan")
    assert names["model"].num_parameters() < names["base"].num_parameters()
    assert (stage.directory / "llama-gguf" / "model.gguf").exists()


def test_the_formats_are_those_that_there_are():
    assert table(sections(PAGE)["Other runtimes"]).keys() == {*RUNTIMES, "gguf"}
