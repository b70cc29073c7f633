"""The card on the Hub: what a person wrote there survives the next push, whatever pushes; the picture beside it."""

from __future__ import annotations

from pathlib import Path

import matplotlib.image
import pytest
from huggingface_hub import ModelCard

from hf_prune.hub.push import push_folder
from tests.hub.pruned import pruned, tokenizer
from tests.hub_metadata import check_card
from tests.training.data import trainer


REPO = "ada/small"


@pytest.fixture
def folder(tmp_path):
    pruned().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def write_into(api, revision="main"):
    """A person edits the card on the Hub: a section, a sentence, a key of the header."""
    text = Path(api.hf_hub_download(REPO, "README.md", revision=revision)).read_text()
    text = text.replace("## Limits\n", "## Ethics\n\nOf a person.\n\n## Limits\n\nWrong on birds.\n")
    text = text.replace("---\n", "---\nlicense: mit\n", 1)
    api.upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id=REPO, revision=revision)


def check_kept(card):
    assert check_card(card.content) == ([], []) and card.data.license == "mit"
    assert card.text.count("## Ethics\n\nOf a person.") == card.text.count("Wrong on birds.") == 1
    assert card.text.count("## How to load it") == card.text.count("## Limits") == 1


@pytest.mark.parametrize("way", ["folder", "model", "tokenizer"])
def test_what_a_person_wrote_survives_the_next_push(folder, hub, api, way):
    push_folder(folder, REPO)
    write_into(api)
    for _ in range(2):
        if way == "folder":
            push_folder(folder, REPO, commit_message="again")
        elif way == "model":
            pruned().push_to_hub(REPO)
        else:
            tokenizer().push_to_hub(REPO)
    check_kept(ModelCard.load(REPO))


def test_and_on_a_branch(folder, hub, api):
    push_folder(folder, REPO, revision="draft")
    write_into(api, "draft")
    push_folder(folder, REPO, revision="draft")
    check_kept(ModelCard.load(Path(api.hf_hub_download(REPO, "README.md", revision="draft"))))


def test_and_a_push_of_the_trainer(hub, api, tmp_path):
    run = trainer(tmp_path / "run", push_to_hub=True, hub_model_id=REPO, max_steps=4, save_strategy="no")
    run.train()
    run.push_to_hub()
    write_into(api)
    run.push_to_hub()
    check_kept(ModelCard.load(REPO))


def test_a_card_that_was_there_before_us_goes_first(folder, hub, api):
    api.create_repo(REPO)
    api.upload_file(path_or_fileobj=b"# Birds\n\nOf a person.\n", path_in_repo="README.md", repo_id=REPO)
    push_folder(folder, REPO)
    card = ModelCard.load(REPO)
    assert card.text.index("Of a person.") < card.text.index("## What left") and "hf_prune" in card.data.tags


def test_the_picture_lies_beside_the_card_and_is_shown_there(folder, hub, api):
    push_folder(folder, REPO)
    assert "](pruning.png)" in ModelCard.load(REPO).text
    assert matplotlib.image.imread(api.hf_hub_download(REPO, "pruning.png")).ndim == 3
    assert not (folder / "pruning.png").exists(), "the folder is only read"


def test_without_matplotlib_there_is_no_picture_and_no_word_of_it(folder, hub, api, monkeypatch):
    monkeypatch.setattr("hf_prune.hub.push.find_spec", lambda name: None)
    push_folder(folder, REPO)
    assert "pruning.png" not in api.list_repo_files(REPO) and "pruning.png" not in ModelCard.load(REPO).text
