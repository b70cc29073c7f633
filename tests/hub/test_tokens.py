"""Nothing of a token is ever printed, logged or written, at the most talkative level, whatever fails."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import traceback

import pytest
from huggingface_hub import constants

import hf_prune
from hf_prune.errors import PruneError
from hf_prune.hub.push import push_folder
from tests import zoo
from tests.hub.pruned import UNEVEN, pruned
from tests.training.data import trainer


REPO, BASE = "ada/small", "ada/base"
SECRET = "S3cr3tS3cr3tS3cr3t"
WRONG = f"hf_{SECRET}"


@pytest.fixture
def heard(tmp_path, monkeypatch, capfd):
    """What was printed, logged and written so far; where the token is asked for is not a place that it is told to."""
    log = logging.FileHandler(tmp_path / "debug.log")
    monkeypatch.setattr(constants, "HF_DEBUG", True)  # each request as a curl command
    root, level = logging.getLogger(), logging.getLogger().level
    root.addHandler(log)
    root.setLevel(logging.DEBUG)
    named = [
        logging.getLogger(name) for name in ("huggingface_hub", "transformers", "hf_prune", "httpcore2", "httpx2")
    ]
    levels = [(each, each.level, each.propagate) for each in named]
    for each in named:
        each.setLevel(logging.DEBUG)
        each.propagate = True

    def heard() -> str:
        log.flush()
        written = [path.read_bytes().decode("latin-1") for path in tmp_path.rglob("*") if path.is_file()]
        return "\n".join([*capfd.readouterr(), *written])

    yield heard
    root.removeHandler(log)
    root.setLevel(level)
    for each, was, propagated in levels:
        each.setLevel(was)
        each.propagate = propagated


def by_folder(tmp_path, token):
    pruned().save_pretrained(tmp_path / "model")
    push_folder(tmp_path / "model", REPO, token=token)


def by_model(tmp_path, token):
    pruned().push_to_hub(REPO, token=token)


def by_plan(tmp_path, token):
    model = zoo.build("bert")
    hf_prune.make_plan(model, UNEVEN).push_to_hub(REPO, model, base_model=BASE, token=token)


def by_trainer(tmp_path, token):
    run = trainer(
        tmp_path / "run",
        push_to_hub=True,
        hub_model_id=REPO,
        hub_token=token,
        hub_strategy="all_checkpoints",
        hub_always_push=True,
        max_steps=2,
        save_strategy="steps",
        save_steps=1,
    )
    run.train()
    assert run.args.hub_token == token
    run.push_to_hub()


FAULTS = {
    "nothing": lambda hub: None,
    "a conflict": lambda hub: hub.fail("POST", "/commit/", 412, times=9),
    "storage": lambda hub: hub.fail("PUT", "/storage/", 403, times=9),
    "death in the middle": lambda hub: hub.die("PUT", "/storage/"),
    "death before the commit": lambda hub: hub.die("POST", "/commit/"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("way", [by_folder, by_model, by_plan, by_trainer], ids=lambda way: way.__name__)
def test_a_token_that_is_given_is_told_to_nobody(hub, api, tmp_path, monkeypatch, heard, way, fault):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.delenv("HF_TOKEN")
    api.create_repo(BASE)
    FAULTS[fault](hub)
    try:
        way(tmp_path, hub.token)
    except Exception:
        traceback.print_exc()
    said = heard()
    assert "curl -X POST" in said, "the log isn't as talkative as this test wants it"
    assert hub.token not in said
    pushed = [blob.data for repo in hub.store.repos.values() for blob in repo.commit_at("main").files.values()]
    assert not [data for data in [*pushed, *hub.store.large_objects.values()] if hub.token.encode() in data]
    assert bool(pushed) and (fault != "nothing" or len(pushed) > 4)


@pytest.mark.parametrize("token", [WRONG, f"{WRONG}\n", f"hf_\n{SECRET}", f"{WRONG}é", f"hf_ {SECRET}"], ids=ascii)
@pytest.mark.parametrize("way", [by_folder, by_model, by_plan], ids=lambda way: way.__name__)
def test_nor_is_a_wrong_one(hub, api, tmp_path, monkeypatch, heard, way, token):
    monkeypatch.delenv("HF_TOKEN")
    api.create_repo(BASE)
    with pytest.raises(PruneError, match=r"answered 401|which no token has") as caught:
        way(tmp_path, token)
    traceback.print_exception(caught.value)
    for read in (hf_prune.Recipe.from_pretrained, hf_prune.PruningPlan.from_pretrained):
        with pytest.raises(PruneError) as caught:
            read(REPO, token=token)
        traceback.print_exception(caught.value)
    assert SECRET not in heard()


def test_a_token_read_from_a_file_with_its_line_end_is_taken(hub, api, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    pruned().push_to_hub(REPO, token=f"{hub.token}\n")
    by_folder(tmp_path, f"{hub.token}\n")
    assert hf_prune.Recipe.from_pretrained(REPO, token=f"{hub.token}\n").name == "uneven"


@pytest.mark.parametrize("token", [None, pytest.param(WRONG, marks=pytest.mark.slow)])
def test_the_command_is_silent_about_it_where_it_says_all_else(hub, tmp_path, token):
    pruned().save_pretrained(tmp_path / "model")
    talkative = {"HF_DEBUG": "1", "HF_HUB_VERBOSITY": "debug", "TRANSFORMERS_VERBOSITY": "debug"}
    done = subprocess.run(
        [sys.executable, "-m", "hf_prune", "push", "model", REPO],
        env={**os.environ, **hub.env(tmp_path / "home", token), **talkative},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == (2 if token else 0), done.stderr
    written = [path.read_bytes().decode("latin-1") for path in tmp_path.rglob("*") if path.is_file()]
    said = "\n".join([done.stdout, done.stderr, *written])
    assert "curl -X POST" in done.stderr and (token or hub.token) not in said
