"""What is pushed arrives whole, loads back with equal logits, and nothing is lost where pushing fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, snapshot_download
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

import hf_prune
from hf_prune.cli.main import app
from hf_prune.errors import CheckpointError, PruneError
from hf_prune.hub.push import push_folder
from tests.hub.pruned import FILES, STOCK, UNEVEN, contents, logits, logits_without_hf_prune, pruned, tokenizer
from tests.hub_metadata import check_card


REPO = "ada/small"
HELD = ".gitattributes"  # what a new repository holds
SAVED = FILES | {"modeling_hf_prune.py", "pruning.png"}


@pytest.fixture(scope="module")
def model():
    return pruned()


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# --------------------------------------------------------------------------------------------------------------
# what arrives


def test_a_folder_arrives_whole_and_loads_with_and_without_the_plugin(model, folder, hub, api, tmp_path):
    before = contents(folder)
    assert push_folder(folder, REPO) == f"{hub.url}/{REPO}"
    pushed = set(api.list_repo_files(REPO)) - {HELD}
    assert pushed == SAVED | {"tokenizer.json", "tokenizer_config.json"}
    assert [commit.title for commit in api.list_repo_commits(REPO)] == ["Upload pruned model", "initial commit"]
    assert contents(folder) == before
    loaded = AutoModelForSequenceClassification.from_pretrained(REPO)
    assert torch.equal(logits(loaded), logits(model))
    assert AutoTokenizer.from_pretrained(REPO)("hello hub")["input_ids"] == [3, 4]
    assert hf_prune.Recipe.from_pretrained(REPO).to_dict() == hf_prune.Recipe.from_dict(UNEVEN).to_dict()
    auto = "AutoModelForSequenceClassification"
    assert torch.equal(logits_without_hf_prune(REPO, hub, tmp_path / "home", auto), logits(model))


def test_the_model_pushes_itself(model, hub, api, tmp_path):
    model.push_to_hub(REPO, commit_message="smaller")
    tokenizer().push_to_hub(REPO)
    assert set(api.list_repo_files(REPO)) - {HELD} == SAVED | {"tokenizer.json", "tokenizer_config.json"}
    assert [commit.title for commit in api.list_repo_commits(REPO)][1] == "smaller"
    assert torch.equal(logits(AutoModelForSequenceClassification.from_pretrained(REPO)), logits(model))
    card = ModelCard.load(REPO)
    assert "pruned" in card.data.tags and f'from_pretrained("{REPO}"' in card.text, (
        "the tokenizer's push took the card"
    )
    auto = "AutoModelForSequenceClassification"
    assert torch.equal(logits_without_hf_prune(REPO, hub, tmp_path / "home", auto), logits(model))


def test_a_stock_result_is_pushed_without_a_trace_of_us_in_its_config(hub, api, tmp_path):
    model = pruned(STOCK, "llama")
    model.save_pretrained(tmp_path / "model", push_to_hub=True, repo_id=REPO)
    assert set(api.list_repo_files(REPO)) - {HELD} == FILES | {"generation_config.json", "pruning.png"}
    config = json.loads(Path(api.hf_hub_download(REPO, "config.json")).read_text())
    assert not {"hf_prune", "auto_map"} & config.keys()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(REPO)), logits(model))


def test_a_loaded_model_is_pushed_again_with_the_modelling_file(model, folder, hub, api, tmp_path):
    push_folder(folder, REPO)
    again = AutoModelForSequenceClassification.from_pretrained(REPO)
    again.push_to_hub("ada/again")
    assert "modeling_hf_prune.py" in api.list_repo_files("ada/again")
    config = json.loads(Path(api.hf_hub_download("ada/again", "config.json")).read_text())
    assert set(config["auto_map"].values()) and all("--" not in name for name in config["auto_map"].values())
    assert torch.equal(logits(AutoModelForSequenceClassification.from_pretrained("ada/again")), logits(model))


def test_a_dense_model_is_pushed_as_transformers_does(hub, api):
    from tests import zoo

    model = zoo.build("bert")
    model.push_to_hub(REPO)
    assert set(api.list_repo_files(REPO)) == {HELD, "README.md", "config.json", "model.safetensors"}
    assert "hf_prune" not in ModelCard.load(REPO).content


def test_shards_replace_the_single_file_in_one_commit_and_back(model, hub, api):
    model.push_to_hub(REPO)
    model.push_to_hub(REPO, max_shard_size="20KB")
    files = set(api.list_repo_files(REPO))
    assert "model.safetensors" not in files and "model.safetensors.index.json" in files
    assert torch.equal(logits(AutoModelForSequenceClassification.from_pretrained(REPO)), logits(model))
    model.push_to_hub(REPO)
    assert set(api.list_repo_files(REPO)) - {HELD} == SAVED
    assert len(api.list_repo_commits(REPO)) == 1 + 3
    # no state of the repository in between held weights of two kinds
    for commit in api.list_repo_commits(REPO)[:-1]:
        at = api.list_repo_files(REPO, revision=commit.commit_id)
        assert ("model.safetensors" in at) != ("model.safetensors.index.json" in at)


def test_a_branch_and_a_pull_request(model, folder, hub, api):
    assert push_folder(folder, REPO, revision="draft") == f"{hub.url}/{REPO}/tree/draft"
    assert api.list_repo_files(REPO) == [HELD]
    loaded = AutoModelForSequenceClassification.from_pretrained(REPO, revision="draft")
    assert torch.equal(logits(loaded), logits(model))
    assert hf_prune.Recipe.from_pretrained(REPO, revision="draft").name == "uneven"
    assert push_folder(folder, REPO, create_pr=True) == f"{hub.url}/{REPO}/discussions/1"
    assert api.list_repo_files(REPO) == [HELD]
    api.merge_pull_request(REPO, 1)
    assert set(api.list_repo_files(REPO)) >= SAVED
    assert push_folder(folder, REPO, create_pr=True) == f"{hub.url}/{REPO}", "nothing differs"
    model.push_to_hub("ada/second", create_pr=True, commit_message="a proposal")
    assert [item.title for item in api.get_repo_discussions("ada/second")] == ["a proposal"]
    assert api.list_repo_files("ada/second") == [HELD]
    proposed = AutoModelForSequenceClassification.from_pretrained("ada/second", revision="refs/pr/1")
    assert torch.equal(logits(proposed), logits(model))
    with pytest.raises(PruneError, match="always opened against `main`"):
        push_folder(folder, REPO, revision="draft", create_pr=True)


def test_a_pull_request_to_somebody_elses_repository(folder, hub, api):
    api.create_repo("ada/open", private=False)
    address = push_folder(folder, "ada/open", create_pr=True, token="hf_loopback_other")
    assert address == f"{hub.url}/ada/open/discussions/1"


def test_new_repositories_of_folders_are_private_unless_told(folder, hub, api, caplog):
    push_folder(folder, REPO)
    assert api.model_info(REPO).private
    push_folder(folder, "ada/open", private=False)
    assert not api.model_info("ada/open").private
    assert "public" not in caplog.text
    push_folder(folder, "ada/open")
    assert not api.model_info("ada/open").private
    assert "ada/open exists and is public" in caplog.text
    done = CliRunner().invoke(app, ["push", str(folder), "ada/typed"])
    assert done.exit_code == 0 and done.stdout.strip() == f"{hub.url}/ada/typed"
    assert api.model_info("ada/typed").private


def test_what_training_left_stays_at_home(folder, hub, api):
    for name in ("optimizer.pt", "training_args.bin", "checkpoint-3/config.json", ".cache/x", "runs/events", "a.tmp"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    (folder / "notes").mkdir()
    (folder / "notes" / "how.md").write_text("kept")
    push_folder(folder, REPO)
    pushed = set(api.list_repo_files(REPO)) - {HELD}
    assert pushed == SAVED | {"tokenizer.json", "tokenizer_config.json", "notes/how.md"}


# --------------------------------------------------------------------------------------------------------------
# the card


def test_the_card_passes_the_hubs_check_and_says_how_to_load(folder, hub, api):
    push_folder(folder, REPO)
    card = ModelCard.load(REPO)
    assert check_card(card.content) == ([], [])
    assert card.data.library_name == "transformers" and {"hf_prune", "pruned"} <= set(card.data.tags)
    assert f'from_pretrained("{REPO}", trust_remote_code=True)' in card.text
    assert "path/or/repo" in (folder / "README.md").read_text(), "the folder's own card was changed"
    assert api.model_info(REPO).library_name == "transformers"


def test_tags_of_the_user_are_added_to_ours(hub):
    model = pruned()
    model.add_model_tags(["mine"])
    model.push_to_hub(REPO)
    assert {"hf_prune", "pruned", "mine"} <= set(ModelCard.load(REPO).data.tags)


@pytest.mark.parametrize("header", ["license: mine", "base_model: /local/path", "language: no", "a: ["])
def test_a_card_that_the_hub_refuses_is_told_and_nothing_arrives(folder, hub, api, header):
    (folder / "README.md").write_text(f"---\n{header}\n---\n# Mine\n")
    with pytest.raises(CheckpointError, match=r"card's header was refused.*README\.md"):
        push_folder(folder, REPO)
    assert api.list_repo_files(REPO) == [HELD]


def test_a_snapshot_is_a_checkpoint_like_the_folder(model, folder, hub):
    push_folder(folder, REPO)
    got = contents(Path(snapshot_download(REPO)))
    mine = contents(folder)
    assert {name for name in mine if got.get(name) != mine[name]} == {".hf_prune_complete", "README.md"}
