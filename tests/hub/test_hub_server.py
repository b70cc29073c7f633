"""The loopback Hub against the real client: what the other tests of this folder stand on."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.hub_metadata import check_card
from tests.hub_server import HubServer
from tests.hub_store import HubError


REPO = "ada/model"


@pytest.fixture
def repo(api: HfApi) -> str:
    return api.create_repo(REPO).repo_id


def test_a_folder_comes_back_as_it_was_sent(api: HfApi, repo: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "nested").mkdir(parents=True)
    files = {
        "config.json": b"{}",
        "nested/note.txt": "ünïcode".encode(),
        "empty.txt": b"",
        "model.safetensors": os.urandom(11 * 1024 * 1024),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    info = api.upload_folder(repo_id=repo, folder_path=folder)

    got = Path(snapshot_download(repo, token=api.token))
    assert {n: (got / n).read_bytes() for n in files} == files
    assert got.name == info.oid == api.model_info(repo).sha

    model = api.model_info(repo, files_metadata=True)
    sizes = {s.rfilename: s.size for s in model.siblings}
    assert {name: sizes[name] for name in files} == {name: len(data) for name, data in files.items()}
    stored_large = [s.rfilename for s in model.siblings if s.lfs]
    assert stored_large == ["model.safetensors"]


def test_one_file_at_each_kind_of_revision(api: HfApi, repo: str) -> None:
    def push(text: str, **where: object) -> object:
        operation = CommitOperationAdd("a.txt", text.encode())
        return api.create_commit(repo, [operation], commit_message=text, **where)

    first = push("first")
    api.create_tag(repo, tag="v1")
    api.create_branch(repo, branch="draft/x")
    push("second")
    push("branch", revision="draft/x")
    proposed = push("proposed", create_pr=True)

    expected = {None: "second", "v1": "first", first.oid: "first", "draft/x": "branch", "refs/pr/1": "proposed"}
    for revision, text in expected.items():
        assert Path(hf_hub_download(repo, "a.txt", revision=revision, token=api.token)).read_text() == text

    refs = api.list_repo_refs(repo, include_pull_requests=True)
    assert {ref.name for ref in refs.branches} == {"main", "draft/x"}
    assert [ref.name for ref in refs.tags] == ["v1"]
    assert [ref.ref for ref in refs.pull_requests] == ["refs/pr/1"]
    assert proposed.pr_num == 1 and [d.num for d in api.get_repo_discussions(repo)] == [1]
    assert api.get_discussion_details(repo, 1).target_branch == "refs/heads/main"

    api.merge_pull_request(repo, 1)
    assert Path(hf_hub_download(repo, "a.txt", token=api.token)).read_text() == "proposed"
    api.delete_branch(repo, branch="draft/x")
    api.delete_tag(repo, tag="v1")
    assert [ref.name for ref in api.list_repo_refs(repo).branches] == ["main"]


def test_a_commit_deletes_and_lists(api: HfApi, repo: str) -> None:
    add = [CommitOperationAdd(name, b"x") for name in ("a.txt", "b/c.txt", "b/d.txt", "e.txt")]
    api.create_commit(repo, add, commit_message="add")
    remove = [CommitOperationDelete("a.txt"), CommitOperationDelete("b/", is_folder=True)]
    api.create_commit(repo, remove, commit_message="remove")
    assert sorted(api.list_repo_files(repo)) == [".gitattributes", "e.txt"]
    assert [c.title for c in api.list_repo_commits(repo)] == ["remove", "add", "initial commit"]
    assert [entry.path for entry in api.list_repo_tree(repo, recursive=True)] == [".gitattributes", "e.txt"]
    assert [entry.path for entry in api.list_repo_tree(repo, revision="main", path_in_repo=None)][-1] == "e.txt"
    assert api.get_paths_info(repo, ["e.txt", "none"])[0].size == 1


def test_a_card_is_pushed_and_its_metadata_shown(api: HfApi, repo: str) -> None:
    # not `ModelCard.push_to_hub`: older clients ask huggingface.co whether a card is valid, whatever the endpoint
    upload_card = partial(api.upload_file, path_in_repo="README.md", repo_id=repo)
    upload_card(path_or_fileobj=b"---\nlicense: mit\nlibrary_name: transformers\ntags: [hf_prune]\n---\n# Hello\n")
    info = api.model_info(repo)
    assert info.card_data.license == "mit" and info.library_name == "transformers" and info.tags == ["hf_prune"]
    assert ModelCard.load(repo, token=api.token).text.strip() == "# Hello"

    with pytest.raises(ValueError, match="base_model"):
        upload_card(path_or_fileobj=b"---\nbase_model: ./here\n---\n# Hello\n")


def test_errors_are_those_of_the_hub(hub: HubServer, api: HfApi, repo: str) -> None:
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_repo(REPO)
    assert caught.value.response.status_code == 409
    assert api.create_repo(REPO, exist_ok=True).repo_id == REPO

    with pytest.raises(RepositoryNotFoundError):
        api.model_info("ada/none")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(repo, revision="none")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(repo, "none.txt", token=api.token)
    with pytest.raises(HfHubHTTPError, match="Invalid credentials in Authorization header") as caught:
        HfApi(endpoint=hub.url, token="hf_wrong").model_info(repo)
    assert not isinstance(caught.value, RepositoryNotFoundError)
    with pytest.raises(HfHubHTTPError, match="403"):
        HfApi(endpoint=hub.url, token="hf_loopback_other").create_repo("ada/theirs")
    line = {"key": "lfsFile", "value": {"path": "x", "oid": "0" * 64}}
    with pytest.raises(HubError, match="never uploaded"):
        hub.store.commit(hub.tokens[hub.token], repo, "main", [line], create_pr=False)


def test_a_private_repository_is_for_its_owner(hub: HubServer, api: HfApi) -> None:
    api.create_repo("lab/secret", private=True)
    assert api.model_info("lab/secret").private
    for token in (False, "hf_loopback_other"):
        with pytest.raises(RepositoryNotFoundError):
            HfApi(endpoint=hub.url, token=token).model_info("lab/secret")
    api.delete_repo("lab/secret")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("lab/secret")


def test_faults_are_injected_and_passed_over(hub: HubServer, api: HfApi, repo: str) -> None:
    hub.fail("GET", r"/api/models/ada/model$", status=503)
    with pytest.raises(HfHubHTTPError, match="503"):
        api.model_info(repo)
    assert api.model_info(repo).id == repo


def test_another_process_uses_it_through_its_environment(hub: HubServer, tmp_path: Path) -> None:
    code = (
        "import huggingface_hub as h; print(h.whoami()['name']); print(h.create_repo('ada/sub').repo_id);"
        "h.upload_file(path_or_fileobj=b'hi', path_in_repo='a.txt', repo_id='ada/sub');"
        "print(open(h.hf_hub_download('ada/sub', 'a.txt')).read())"
    )
    env = {**os.environ, **hub.env(tmp_path / "other")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["ada", "ada/sub", "hi"]


@pytest.mark.parametrize(
    ("header", "complaint"),
    [
        ("license: apache-2.0\nlanguage: [en, de]\nbase_model: org/model\nbase_model_relation: finetune", None),
        (
            "model-index: [{name: m, results: [{task: {type: t}, dataset: {type: d, name: D}, "
            "metrics: [{type: f1, value: 0.5}]}]}]",
            None,
        ),
        ("license: mine", "license"),
        ("license: other", "license_name"),
        ("language: no", "language"),
        ("base_model: /local/path", "base_model"),
        ("base_model_relation: pruned", "base_model_relation"),
        ("tags: pruned", "tags"),
        ("pipeline_tag: Text Classification", "pipeline_tag"),
        ("model-index: [{name: m, results: []}]", None),
        ("model-index: [{name: m, results: {}}]", "results"),
        ("model-index: [{results: [{task: {type: t}, metrics: []}]}]", "dataset.type"),
        ("a: [", "YAML"),
        ("[1]", "mapping"),
    ],
)
def test_the_validator_tells_good_metadata_from_bad(header: str, complaint: str | None) -> None:
    errors, warnings = check_card(f"---\n{header}\n---\n# Title\n")
    assert warnings == []
    assert any(complaint in error for error in errors) if complaint else errors == []


def test_the_validator_warns_of_missing_metadata() -> None:
    assert check_card("# Title\n") == ([], ["empty or missing yaml metadata in repo card"])
