"""A recipe that lies on the Hub, beside a model or alone, is run from there."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

import hf_prune
from hf_prune.cli.main import app
from hf_prune.errors import RecipeError
from hf_prune.recipe.yaml import write_yaml


REPO = "ada/recipe"
RECIPE = {
    "version": 1,
    "name": "shared",
    "model": {"name_or_path": "ada/base", "task": "text-classification"},
    "data": {"name_or_path": "ada/data"},
    "output": {"dir": "out", "push_to_hub": True, "repo_id": "ada/theirs"},
    "prune": [{"target": "ffn_neurons", "sparsity": 0.5}],
}


@pytest.fixture
def share(hub, api, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def share(recipe, **where):
        api.create_repo(REPO, exist_ok=True)
        if branch := where.get("revision"):
            api.create_branch(REPO, branch=branch)
        text = write_yaml(recipe).encode()
        api.upload_file(path_or_fileobj=text, path_in_repo="recipe.yaml", repo_id=REPO, **where)

    return share


def test_it_runs_with_overrides_and_by_revision(share, tmp_path):
    share(RECIPE)
    share({**RECIPE, "name": "other"}, revision="draft/2")
    done = CliRunner().invoke(app, ["run", REPO, "prune.0.sparsity=0.25", "--smoke"])
    assert done.exit_code == 0 and "the recipe works" in done.output, done.output
    assert CliRunner().invoke(app, ["validate", REPO]).exit_code == 0
    assert hf_prune.Recipe.find(REPO, ["prune.0.sparsity=0.25"]).prune[0].sparsity == 0.25
    assert (hf_prune.Recipe.find(REPO).name, hf_prune.Recipe.find(f"{REPO}@draft/2").name) == ("shared", "other")
    assert not (tmp_path / "out").exists()


def test_it_pushes_only_where_who_runs_it_says_so(share):
    share(RECIPE)
    assert hf_prune.Recipe.find(REPO).output.push_to_hub is False
    assert hf_prune.Recipe.find(REPO, ["output.push_to_hub=true"]).output.push_to_hub is True
    assert hf_prune.Recipe.from_pretrained(REPO).output.push_to_hub is True, "what is there is told as it is"


@pytest.mark.parametrize("directory", ["/tmp/elsewhere", "../elsewhere", "a/../../b"])
def test_it_writes_below_the_working_directory_only(share, directory):
    share({**RECIPE, "output": {"dir": directory}})
    with pytest.raises(RecipeError, match=r"outside the working directory.*output\.dir="):
        hf_prune.Recipe.find(REPO)
    assert hf_prune.Recipe.find(REPO, ["output.dir=/tmp/mine"]).output.dir == "/tmp/mine"


def test_mistakes_in_it_are_told_with_their_place(share):
    share({**RECIPE, "prune": [{"target": "neurons"}]})
    with pytest.raises(RecipeError, match=r"recipe\.yaml:\d+:\d+: prune\.0\.target"):
        hf_prune.Recipe.find(REPO)


def test_what_is_not_there_is_told(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match="'ada/none' is no directory, and no Hub repository"):
        hf_prune.Recipe.find("ada/none")
    for path in ("recipes/none.yaml", "a/b/c", "none"):
        n_requests = len(hub.requests)
        with pytest.raises(RecipeError):
            hf_prune.Recipe.find(path)
        assert len(hub.requests) == n_requests, "a path was asked of the Hub"


def test_a_directory_of_a_pruned_model_is_run_again(tmp_path):
    hf_prune.Recipe.from_dict(RECIPE).to_yaml(tmp_path / "recipe.yaml")
    found = hf_prune.Recipe.find(str(tmp_path), ["output.dir=again"])
    assert (found.name, found.output.dir, found.output.push_to_hub) == ("shared", "again", True)
    assert json.dumps(found.to_dict())
