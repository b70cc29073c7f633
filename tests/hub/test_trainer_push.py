"""`PruningTrainer` pushes as Trainer does; the card is ours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer

import hf_prune
from tests.hub.pruned import FILES, logits, logits_without_hf_prune, pruned, tokenizer
from tests.hub_metadata import check_card
from tests.training.data import RECIPE, trainer


REPO = "ada/trained"
WANTED = FILES | {"modeling_hf_prune.py", "tokenizer.json", "tokenizer_config.json"}


def pushing(directory, **options):
    run = trainer(
        directory,
        push_to_hub=True,
        hub_model_id=REPO,
        hub_private_repo=True,
        save_strategy="steps",
        save_steps=4,
        max_steps=8,
        **options,
    )
    run.processing_class = tokenizer()
    return run


def cards(api):
    """The card at each commit, oldest first; None where there is none."""
    found = []
    for commit in reversed(api.list_repo_commits(REPO)):
        files = api.list_repo_files(REPO, revision=commit.commit_id)
        path = api.hf_hub_download(REPO, "README.md", revision=commit.commit_id) if "README.md" in files else None
        found.append(path and Path(path).read_text())
    return found


@pytest.mark.parametrize("strategy", ["end", "every_save"])
def test_the_trainer_pushes_the_small_model_with_our_card(hub, api, tmp_path, strategy):
    run = pushing(tmp_path / "run", hub_strategy=strategy, hub_always_push=True)
    run.train()
    n_before = len(api.list_repo_commits(REPO))
    assert n_before == 1 + (2 if strategy == "every_save" else 0)
    run.push_to_hub()
    assert set(api.list_repo_files(REPO)) >= WANTED
    assert api.model_info(REPO).private
    loaded = AutoModelForSequenceClassification.from_pretrained(REPO)
    assert torch.equal(logits(loaded), logits(run.model))
    assert loaded.config.hf_prune, "the dense model of an earlier push was loaded"
    assert AutoTokenizer.from_pretrained(REPO)("hub")["input_ids"] == [4]
    assert hf_prune.Recipe.from_pretrained(REPO).to_dict() == hf_prune.Recipe.from_dict(RECIPE).to_dict()
    report = json.loads(Path(api.hf_hub_download(REPO, "pruning_report.json")).read_text())
    assert report == run.pruning_report.to_dict()
    # Trainer tags its own cards so
    assert not [card for card in cards(api) if card and "generated_from_trainer" in card]
    card = ModelCard.load(REPO)
    assert check_card(card.content) == ([], []) and "## What left" in card.text
    assert f'from_pretrained("{REPO}"' in card.text
    if strategy == "end":
        auto = "AutoModelForSequenceClassification"
        assert torch.equal(logits_without_hf_prune(REPO, hub, tmp_path / "home", auto), logits(run.model))


def test_saving_pushes_too(hub, api, tmp_path):
    run = pushing(tmp_path / "run")
    run.train()
    run.save_model()  # Trainer pushes from here when `push_to_hub` is on
    assert set(api.list_repo_files(REPO)) >= WANTED
    assert "generated_from_trainer" not in ModelCard.load(REPO).content


def test_what_a_pruned_model_pushes_while_it_is_trained_on_loads_with_remote_code(hub, api, tmp_path):
    run = pushing(tmp_path / "run", recipe=None, model=pruned(), hub_strategy="every_save", hub_always_push=True)
    run.train()
    assert set(api.list_repo_files(REPO)) >= {"model.safetensors", "modeling_hf_prune.py"}
    auto = "AutoModelForSequenceClassification"
    assert torch.equal(logits_without_hf_prune(REPO, hub, tmp_path / "home", auto), logits(run.model))


def test_a_stock_trainer_keeps_the_card_of_a_pruned_model(hub, api, tmp_path):
    run = pushing(tmp_path / "run", recipe=None, model=pruned(), kind=Trainer)
    run.train()
    run.push_to_hub()
    card = ModelCard.load(REPO)
    assert "generated_from_trainer" not in card.data.tags and "## What left" in card.text
    assert set(api.list_repo_files(REPO)) >= WANTED


def test_without_a_recipe_the_card_is_trainers(hub, api, tmp_path):
    run = pushing(tmp_path / "run", recipe=None)
    run.train()
    run.push_to_hub()
    card = ModelCard.load(REPO)
    assert "generated_from_trainer" in card.data.tags and "hf_prune" not in card.content
