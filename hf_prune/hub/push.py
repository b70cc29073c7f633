"""Sends a saved checkpoint to the Hub in one commit, so that nobody ever downloads half of an update."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo

# `HTTPError` is the base of the HTTP library's errors (httpx, later httpx2), which the hub re-exports by importing it.
from huggingface_hub.errors import HTTPError, RemoteEntryNotFoundError, RevisionNotFoundError
from safetensors import SafetensorError, safe_open

from hf_prune.errors import CheckpointError
from hf_prune.remote import address_of, explained, make_commit
from hf_prune.report import PruningReport
from hf_prune.report.card import for_repository, with_picture
from hf_prune.report.picture import FILE_NAME, draw, kept_grids
from hf_prune.report.sections import merge


# What training and tools leave beside a model. Resuming needs it, users of the model don't, and pickled training
# arguments would publish the paths of the machine. Patterns are matched on every part of a file's path.
LEFT_OUT = (
    ".*",
    "__pycache__",
    "checkpoint-*",
    "global_step*",
    "runs",
    "wandb",
    "events.out.tfevents.*",
    "optimizer*",
    "scheduler.pt",
    "scaler.pt",
    "rng_state*.pth",
    "trainer_state.json",
    "training_args.bin",
    "*.tmp",
    "*.partial",
    "*.incomplete",
    "*.lock",
)
CARD, REPORT = "README.md", "pruning_report.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# The weight files that `from_pretrained` looks for in a repository.
LOADABLE = re.compile(r"(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload pruned model",
    endpoint: str | None = None,
) -> str:
    """Pushes a saved checkpoint: weights, config, tokenizer, recipe, report, card and modelling file.

    The folder is only read. Weight files of an earlier push that this checkpoint no longer has leave in the same
    commit: a stale `model.safetensors` beside new shards would be loaded in their stead.

    Args:
        folder: where the checkpoint was saved; hidden files, training states and partial files stay behind.
        repo_id: `name` or `owner/name`; created if it doesn't exist.
        private: whether a *new* repository is private. One that exists keeps its visibility, and a warning says so
            if that is public.
        token: a token that may write; by default the one stored by `hf auth login`, or `HF_TOKEN`.
        revision: the branch to push to, created from `main` if it doesn't exist.
        create_pr: open a pull request against `main` in place of pushing to it.
        commit_message: the commit's first line.
        endpoint: another Hub than the default one.

    Returns:
        The address of the repository, or of the pull request.

    Raises:
        CheckpointError: if the folder isn't a complete checkpoint, or the Hub refuses its card.
        PruneError: if the Hub can't be reached or refuses, or `revision` comes with `create_pr`.
    """
    made = send(
        Path(folder),
        repo_id,
        private=private,
        token=token,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message,
        endpoint=endpoint,
    )
    return address_of(made, revision, create_pr)


def send(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None,
    commit_message: str,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_description: str | None = None,
    endpoint: str | None = None,
) -> CommitInfo:
    """`push_folder` that returns the commit; with `private=None` the Hub's own default decides on a new repository."""
    check_complete(folder)
    paths = sorted(files_to_push(folder))

    def operations(api: HfApi, name: str, found: ModelInfo) -> list[CommitOperationAdd | CommitOperationDelete]:
        there = {sibling.rfilename for sibling in found.siblings or []}
        stale = sorted(path for path in there.difference(paths) if LOADABLE.fullmatch(path))
        picture = _picture(folder, paths)
        additions: list[CommitOperationAdd] = []
        for path in paths:
            content: Path | bytes = folder / path
            if path == CARD:
                # the examples name the repository, and what a person wrote there stays
                text = for_repository((folder / path).read_text(encoding="utf-8"), name)
                text = with_picture(text) if picture else text
                content = merge(text, _card_there(api, name, found.sha) if CARD in there else "").encode()
            additions.append(CommitOperationAdd(path, content))
        additions += [CommitOperationAdd(FILE_NAME, picture)] if picture else []
        return [*additions, *map(CommitOperationDelete, stale)]

    return make_commit(
        repo_id,
        operations,
        str(folder),
        private=private,
        token=token,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message,
        commit_description=commit_description,
        endpoint=endpoint,
    )


def card_for(card: str, repo_id: str, *, token: str | None = None, revision: str | None = None) -> str:
    """The card as it goes to a repository: with what a person wrote into the one that is there.

    Raises:
        PruneError: the Hub can't be reached or refuses.
    """
    try:
        return merge(for_repository(card, repo_id), _card_there(HfApi(token=token), repo_id, revision))
    except (HTTPError, OSError) as error:
        raise explained(error, "the card", repo_id, token) from error


def _card_there(api: HfApi, repo_id: str, revision: str | None) -> str:
    """The card of a repository; empty where there is none, or no such branch yet."""
    try:
        return Path(api.hf_hub_download(repo_id, CARD, revision=revision)).read_text(encoding="utf-8")
    except (RemoteEntryNotFoundError, RevisionNotFoundError):
        return ""


def _picture(folder: Path, paths: Sequence[str]) -> bytes | None:
    """What left, drawn; None without Matplotlib, without a report, or with a picture in the folder."""
    if REPORT not in paths or FILE_NAME in paths or find_spec("matplotlib") is None:
        return None
    content = PruningReport.from_json(folder / REPORT).to_dict()
    if not kept_grids(content):
        return None
    file = io.BytesIO()
    draw(content, file)
    return file.getvalue()


def files_to_push(folder: Path) -> Iterator[str]:
    """The files of a checkpoint as paths relative to `folder`, with forward slashes."""
    for path in folder.rglob("*"):
        parts = path.relative_to(folder).parts
        if path.is_file() and not any(fnmatchcase(part, pattern) for part in parts for pattern in LEFT_OUT):
            yield "/".join(parts)


def check_complete(folder: Path) -> None:
    """Checks that `from_pretrained` would find everything it needs: config, all weights, the modelling file.

    Only headers are read: a file cut short is found by its length.

    Raises:
        CheckpointError: naming what is missing or damaged.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is not a folder; expected one written by `save_pretrained` or `hf-prune run`."
        )
    config = _read_json(folder / "config.json")
    for weights, names in _weight_files(folder).items():
        path = folder / weights
        if not path.is_file():
            raise CheckpointError(
                f"{folder} is incomplete: {INDEX} lists {weights}, which isn't there. Save it again."
            )
        try:
            with safe_open(path, framework="np") as tensors:
                missing = sorted(names.difference(tensors.keys()))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged or cut short ({error}). Save the model again.") from error
        if missing:
            raise CheckpointError(f"{path} lacks {missing[0]!r}, which {INDEX} places there. Save the model again.")
    for reference in (config.get("auto_map") or {}).values():
        # `owner/repo--module.Class` names a file of another repository.
        for name in [reference] if isinstance(reference, str) else filter(None, reference):
            module = name.rpartition(".")[0].replace(".", "/") + ".py"
            if "--" not in name and not (folder / module).is_file():
                raise CheckpointError(
                    f"{folder} is incomplete: config.json says that {name.rpartition('.')[2]} is defined in {module}, "
                    f"which isn't there. Save the model again."
                )


def _weight_files(folder: Path) -> dict[str, set[str]]:
    """The weight files that a load would read, each with the tensors that the index expects in it."""
    if (folder / WEIGHTS).is_file():
        return {WEIGHTS: set()}
    if not (folder / INDEX).is_file():
        raise CheckpointError(f"{folder} has no weights: expected {WEIGHTS}, or {INDEX} and its shards.")
    weight_map = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX} has no weight_map. Save the model again.")
    files: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        files.setdefault(name, set()).add(tensor)
    return files


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} is not a checkpoint: it has no {path.name}.") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}). Save the model again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}; expected an object. Save the model again.")
    return value
