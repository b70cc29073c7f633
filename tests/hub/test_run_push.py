"""`output.push_to_hub` in `hf-prune run`: the whole job ends on the Hub."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from rich.console import Console
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import hf_prune
from hf_prune import job
from hf_prune.errors import PruneError
from tests import zoo
from tests.hub.pruned import FILES, logits, tokenizer
from tests.hub_metadata import check_card


REPO = "ada/job"


@pytest.fixture
def recipe(tmp_path):
    base = tmp_path / "base"
    zoo.build("bert").save_pretrained(base)
    tokenizer().save_pretrained(base)
    (base / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# A base model\n")
    words = random.Random(0)
    lines = [{"text": " ".join(words.choices(["hello", "hub", "x"], k=6)), "label": n % 2} for n in range(24)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return {
        "version": 1,
        "name": "pushed",
        "model": {"name_or_path": str(base), "task": "text-classification"},
        "data": {"name_or_path": str(tmp_path / "data.jsonl"), "max_length": 8},
        "output": {"dir": str(tmp_path / "out"), "push_to_hub": True, "repo_id": REPO},
        "prune": [{"target": "ffn_neurons", "sparsity": 0.5, "criterion": "taylor", "scope": "global"}],
        "calibration": {"samples": 4, "length": 8, "batch_size": 2},
    }


def run(recipe):
    return job.run(hf_prune.Recipe.from_dict(recipe), job.Stages(Console(file=io.StringIO())))


def test_a_run_pushes_all_of_it_with_metrics_dense_and_pruned(hub, api, recipe):
    report = run(recipe)
    assert report.content["pushed_to"] == f"{hub.url}/{REPO}"
    assert set(api.list_repo_files(REPO)) >= FILES | {"tokenizer.json", "modeling_hf_prune.py"}
    assert api.model_info(REPO).private
    loaded = AutoModelForSequenceClassification.from_pretrained(REPO)
    here = AutoModelForSequenceClassification.from_pretrained(recipe["output"]["dir"])
    assert torch.equal(logits(loaded), logits(here))
    assert AutoTokenizer.from_pretrained(REPO)("hello")["input_ids"] == [3]
    pushed = json.loads(Path(api.hf_hub_download(REPO, "pruning_report.json")).read_text())
    measured = report.content["measured"]
    assert pushed["measured"] == measured
    card = ModelCard.load(REPO)
    assert check_card(card.content) == ([], [])
    assert (card.data.license, card.data.language, card.data.pipeline_tag) == (
        "apache-2.0",
        "en",
        "text-classification",
    )
    assert card.data.base_model is None, "a local directory is no model of the Hub"
    assert f'from_pretrained("{REPO}")' in card.text and "name: pushed" in card.text
    dense, small = (measured["metrics"][side]["accuracy"] for side in ("dense", "pruned"))
    assert f"| accuracy | {dense:,.4g} | {small:,.4g} |" in card.text
    assert str(Path(recipe["output"]["dir"]).parent) not in card.content, "a path of this machine was published"


def test_model_and_data_may_be_ids_of_the_hub(hub, api, recipe, tmp_path):
    for repo, folder in (("ada/base", tmp_path / "base"), ("ada/data", tmp_path / "data")):
        api.create_repo(repo, private=False)
        if repo == "ada/data":
            folder.mkdir()
            (tmp_path / "data.jsonl").rename(folder / "data.jsonl")
        api.upload_folder(repo_id=repo, folder_path=folder)
    recipe["model"]["name_or_path"], recipe["data"]["name_or_path"] = "ada/base", "ada/data"
    hf_prune.Recipe.from_dict(recipe).to_yaml(tmp_path / "recipe.yaml")
    environment = {**os.environ, **hub.env(tmp_path / "elsewhere"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "hf_prune", "run", str(tmp_path / "recipe.yaml")]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    card = ModelCard.load(REPO)
    assert card.data.base_model == "ada/base"
    assert card.data.datasets == ["ada/data"]
    assert card.data.license == "apache-2.0"
    report = json.loads((tmp_path / "out" / "pruning_report.json").read_text())
    assert report["model"]["name_or_path"] == "ada/base"
    assert report["measured"]["metrics"]["pruned"]["accuracy"] is not None


def test_a_push_that_fails_leaves_the_saved_model(hub, recipe):
    hub.fail("POST", "/commit/", 403, "Forbidden")
    with pytest.raises(PruneError, match=r"answered 403.*Nothing is lost"):
        run(recipe)
    AutoModelForSequenceClassification.from_pretrained(recipe["output"]["dir"])
    assert (Path(recipe["output"]["dir"]) / "pruning_report.json").exists()
