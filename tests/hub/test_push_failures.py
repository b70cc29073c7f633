"""Pushing that fails: what is said, that nothing is lost here nor half there, that it can be tried again."""

from __future__ import annotations

import logging
import traceback

import pytest
import torch
from huggingface_hub import HfApi
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification
from typer.testing import CliRunner

import hf_prune
from hf_prune.cli.main import app
from hf_prune.errors import CheckpointError, PruneError
from hf_prune.hub.push import push_folder
from tests import zoo
from tests.hub.pruned import UNEVEN, contents, logits, pruned


REPO = "ada/small"
HELD = ".gitattributes"  # what a new repository holds


@pytest.fixture(scope="module")
def model():
    return pruned()


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


TOKEN = "hf_" + "S3cr3tS3cr3tS3cr3t"


@pytest.fixture
def quick(monkeypatch):
    """The client waits between its attempts; not here."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)


def fail(hub, pattern, status, message="injected"):
    method = "PUT" if "storage" in pattern else "POST"
    hub.fail(method, pattern, status, message, times=9)


FAILURES = {
    "bad token": (lambda hub: None, TOKEN, r"answered 401.*hf auth login"),
    "token that may not write": (lambda hub: None, "hf_loopback_read", r"answered 403.*`write` role.*'ada'"),
    "changed meanwhile": (lambda hub: fail(hub, "/commit/", 412), None, r"answered 412.*push again"),
    "conflict": (lambda hub: fail(hub, "/commit/", 409), None, r"answered 409.*push again"),
    "deleted meanwhile": (lambda hub: fail(hub, "/commit/", 404), None, r"answered 404.*check the name and the token"),
    "too many requests": (lambda hub: fail(hub, "/commit/", 429), None, r"answered 429.*wait a few minutes"),
    "storage in trouble": (lambda hub: fail(hub, "/storage/", 500), None, r"answered 500.*push again later"),
    "death in the middle of an upload": (lambda hub: hub.die("PUT", "/storage/"), None, r"can't be reached"),
    "death before the commit": (lambda hub: hub.die("POST", "/commit/"), None, r"can't be reached"),
    "death from the start": (lambda hub: hub.die("POST", "/api/repos/create"), None, r"can't be reached"),
}


@pytest.mark.parametrize("way", ["folder", "model"])
@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_told_with_its_remedy_and_loses_nothing(model, folder, hub, api, caplog, quick, name, way):
    begin, token, message = FAILURES[name]
    api.create_repo(REPO, exist_ok=True)
    before, weights = contents(folder), {key: value.clone() for key, value in model.state_dict().items()}
    begin(hub)
    caplog.set_level(logging.DEBUG)
    with pytest.raises(PruneError, match=message) as caught:
        if way == "folder":
            push_folder(folder, REPO, token=token)
        else:
            model.push_to_hub(REPO, token=token)
    assert "Nothing is lost" in str(caught.value) and REPO in str(caught.value)
    assert contents(folder) == before
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())
    assert hub.store.repos[REPO].commit_at("main").files.keys() == {HELD}, "half a checkpoint arrived"
    said = caplog.text + str(caught.value)
    assert not [secret for secret in (TOKEN, *hub.tokens) if secret in said]


def test_a_token_that_the_answer_quotes_is_taken_out(folder, hub):
    fail(hub, "/commit/", 400, f"{hub.token} may not")
    with pytest.raises(PruneError, match="<token> may not") as caught:
        push_folder(folder, REPO)
    shown = "".join(traceback.format_exception(caught.value))
    assert "direct cause" in shown and hub.token not in shown


def test_a_push_that_failed_succeeds_when_tried_again(folder, hub, api, quick, model):
    fail(hub, "/storage/", 500)
    with pytest.raises(PruneError):
        push_folder(folder, REPO)
    hub.faults.clear()
    push_folder(folder, REPO)
    assert torch.equal(logits(AutoModelForSequenceClassification.from_pretrained(REPO)), logits(model))


@pytest.mark.parametrize(
    ("where", "options", "message"),
    [
        ("ada/small", {"revision": "refs/pr/7"}, r"answered 404.*branch doesn't exist"),
        ("lab/small", {"token": "hf_loopback_other"}, r"answered 403.*namespace that is yours, not 'lab'"),
        ("nobody/small", {}, r"answered 403.*not 'nobody'"),
        ("ada/a b", {}, r"Repo id.*Correct that"),
    ],
)
def test_a_place_that_is_not_there_or_not_ours_is_told(folder, hub, api, where, options, message):
    before = contents(folder)
    with pytest.raises(PruneError, match=message):
        push_folder(folder, where, **options)
    assert contents(folder) == before
    assert not [repo for repo in hub.store.repos.values() if len(repo.commits) > 1]


def test_a_large_upload_that_is_cut_off_completes_when_tried_again(hub, api, quick, tmp_path):
    config = BertConfig(**{**zoo.BERT, "vocab_size": 90_000})  # 11.5 MB of embeddings
    large = BertForSequenceClassification(config)
    hf_prune.prune_(large, UNEVEN)
    large.save_pretrained(tmp_path / "model")
    before = contents(tmp_path / "model")
    assert len(before["model.safetensors"]) > 10 * 2**20
    hub.die("PUT", "/storage/")
    with pytest.raises(PruneError, match=r"can't be reached.*Nothing is lost"):
        push_folder(tmp_path / "model", REPO)
    hub.revive()
    assert contents(tmp_path / "model") == before
    assert not hub.store.large_objects and api.list_repo_files(REPO) == [HELD]
    push_folder(tmp_path / "model", REPO)
    assert contents(tmp_path / "model") == before
    (weights,) = (each for each in api.list_repo_tree(REPO) if each.path == "model.safetensors")
    assert weights.lfs.size == len(before["model.safetensors"])
    assert torch.equal(logits(AutoModelForSequenceClassification.from_pretrained(REPO)), logits(large))
    n_uploads = sum(method == "PUT" for method, _ in hub.requests)
    push_folder(tmp_path / "model", REPO)
    assert sum(method == "PUT" for method, _ in hub.requests) == n_uploads, "what is there was sent again"


def test_an_upload_that_is_cut_off_after_the_weights_sends_them_once(folder, hub, api, quick):
    hub.die("POST", "/commit/")
    with pytest.raises(PruneError, match=r"can't be reached"):
        push_folder(folder, REPO)
    hub.revive()
    n_uploads = sum(method == "PUT" for method, _ in hub.requests)
    push_folder(folder, REPO)
    assert sum(method == "PUT" for method, _ in hub.requests) == n_uploads
    assert "model.safetensors" in api.list_repo_files(REPO)


def test_organisations_have_repositories_too(model, folder, hub, api):
    assert push_folder(folder, "lab/small") == f"{hub.url}/lab/small"
    assert api.model_info("lab/small").private
    loaded = AutoModelForSequenceClassification.from_pretrained("lab/small")
    assert torch.equal(logits(loaded), logits(model))
    with pytest.raises(PruneError, match=r"answered 40[34]"):
        push_folder(folder, "lab/small", token="hf_loopback_other")
    with pytest.raises(OSError, match="lab/small"):
        AutoModelForSequenceClassification.from_pretrained(  # nothing of it is in another cache
            "lab/small", token="hf_loopback_other", cache_dir=folder.parent / "other"
        )


def test_someone_who_pushes_meanwhile_is_not_overwritten(folder, hub, api, monkeypatch):
    """A commit that arrives between the look at the repository and our commit."""
    api.create_repo(REPO)
    look = HfApi.model_info

    def look_then_theirs(self, *args, **kwargs):
        seen = look(self, *args, **kwargs)
        api.upload_file(path_or_fileobj=b"theirs", path_in_repo="theirs.txt", repo_id=REPO)
        return seen

    monkeypatch.setattr(HfApi, "model_info", look_then_theirs)
    with pytest.raises(PruneError, match=r"412.*push again"):
        push_folder(folder, REPO)
    assert set(api.list_repo_files(REPO)) == {HELD, "theirs.txt"}


def test_the_command_ends_with_one_message(folder, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    done = CliRunner().invoke(app, ["push", str(folder), REPO])
    assert isinstance(done.exception, PruneError) and TOKEN not in str(done.exception)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model.safetensors").write_bytes(b"cut"), "damaged or cut short"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no weights"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "is not JSON"),
        (lambda folder: (folder / "modeling_hf_prune.py").unlink(), "modeling_hf_prune.py, which isn't there"),
    ],
)
def test_what_would_not_load_is_not_pushed(folder, hub, damage, message):
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        push_folder(folder, REPO)
    assert not hub.store.repos and not hub.requests


def test_a_recipe_that_is_not_there_is_told(hub, api):
    api.create_repo(REPO)
    for repo_id in (REPO, "ada/none"):
        with pytest.raises(hf_prune.RecipeError, match=r"no Hub repository with a recipe\.yaml"):
            hf_prune.Recipe.from_pretrained(repo_id)
