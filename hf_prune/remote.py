"""What all that pushes to the Hub has in common: one commit, and how its errors are told. No token is ever in them."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo, get_token

# `HTTPError` is the base of the HTTP library's errors (httpx, later httpx2), which the hub re-exports by importing it.
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from hf_prune.errors import CheckpointError, PruneError


logger = logging.getLogger(__name__)

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_TOKEN = re.compile(r"[!-~]+")
# What a push may raise: of a failed LFS upload a RuntimeError, of a header that is refused a ValueError.
ERRORS = (HTTPError, OSError, ValueError, RuntimeError)


def make_commit(
    repo_id: str,
    operations: Callable[[HfApi, str, ModelInfo], Sequence[CommitOperationAdd | CommitOperationDelete]],
    what: str,
    *,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    create_pr: bool,
    commit_message: str,
    commit_description: str | None = None,
    endpoint: str | None = None,
) -> CommitInfo:
    """Create the repository and the branch where they aren't there yet, and make one commit.

    Args:
        operations: (api, full name, what is there now) -> what to add and to delete.
        what: is pushed, in the words of an error.
        private: whether a new repository is private; None: the Hub's own default decides.
        token, revision, create_pr, commit_message, commit_description, endpoint: as `hf_prune.hub.push_folder` takes them.

    Raises:
        PruneError: the Hub can't be reached or refuses, or `revision` comes with `create_pr`.
    """
    if create_pr and revision not in (None, "main"):
        raise PruneError(
            f"revision={revision!r} with create_pr=True: a pull request is always opened against `main`. "
            f"Leave one of them out."
        )
    token = checked_token(token)
    api, branch = HfApi(endpoint=endpoint, token=token, library_name="hf_prune"), revision or "main"
    try:
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        if branch != "main" and not branch.startswith("refs/"):
            api.create_branch(repo.repo_id, branch=branch, exist_ok=True)
        there = api.model_info(repo.repo_id, revision=branch)
        if private and not there.private:
            logger.warning(
                "%s exists and is public: what is pushed there can be read by everybody. Visibility is changed in the "
                "repository's settings.",
                repo.repo_id,
            )
        return api.create_commit(
            repo.repo_id,
            operations(api, repo.repo_id, there),
            commit_message=commit_message,
            commit_description=commit_description,
            revision=branch,
            create_pr=create_pr,
            parent_commit=there.sha,  # what is stale was found there
        )
    except ERRORS as error:
        raise explained(error, what, repo_id, token) from error


def address_of(made: CommitInfo, revision: str | None, create_pr: bool) -> str:
    """Of the pull request, the branch, or the repository."""
    if create_pr and made.pr_url:  # none is opened where nothing differs
        return str(made.pr_url)
    return str(made.repo_url) if revision in (None, "main") else f"{made.repo_url}/tree/{revision}"


def checked_token(token: str | bool | None) -> str | bool | None:
    """A token without the line end that reading a file leaves there. What no header can carry would be quoted by the client.

    Raises:
        PruneError: it, or the one that is stored, holds characters that no token has.
    """
    given = token.strip() if isinstance(token, str) else token
    secret = given if isinstance(given, str) else None if given is False else get_token()
    if secret is not None and not _TOKEN.fullmatch(secret):
        raise PruneError(
            "the token is empty, or holds spaces, line breaks or letters outside ASCII, which no token has: copy it again, "
            "or run `hf auth login`"
        )
    return given


def explained(error: BaseException, what: str, repo_id: str, token: str | bool | None) -> PruneError:
    """The error as a user meets it: what happened, what to do, that `what` (folder or model) is as it was; no token."""
    root = error
    while isinstance(root, RuntimeError) and root.__cause__ is not None:
        root = root.__cause__  # a failed LFS upload arrives as a RuntimeError around the answer
    kind: type[PruneError] = PruneError
    owner = repo_id.partition("/")[0]
    if isinstance(root, HfHubHTTPError):
        status = root.response.status_code
        said = (root.server_message or str(root)).strip().splitlines()[0]
        remedy = {
            401: "The token is missing, wrong or expired: run `hf auth login`, set HF_TOKEN or pass `token`.",
            403: f"The token may not write there: use one with the `write` role and a namespace that is yours, not "
            f"{owner!r}, or open a pull request with `create_pr=True`.",
            404: "The repository or branch doesn't exist, or the token can't see it: check the name and the token.",
            409: "Somebody else changed the repository meanwhile: push again.",
            412: "Somebody else changed the repository meanwhile: push again.",
            429: "Too many requests: wait a few minutes and push again.",
        }.get(status, "The Hub is in trouble: push again later." if status >= 500 else "Correct that and push again.")
        message = f"the Hub answered {status} ({said}). {remedy}"
    elif isinstance(root, ValueError):
        said = " ".join(str(root).split())
        if "README.md" in said:
            kind = CheckpointError
            message = f"the card's header was refused: {said} Correct the top of README.md and push again."
        else:
            message = f"{said} Correct that and push again."
    else:
        said = " ".join(str(root).split()) or type(root).__name__
        message = f"the Hub can't be reached ({said}). Check the connection, HF_ENDPOINT and HF_HUB_OFFLINE."
    message = f"Pushing {what} to {repo_id!r} failed: {message} Nothing is lost: {what} is as it was."
    secret = token.strip() if isinstance(token, str) else get_token()
    if not secret:
        return kind(message)
    for each in _chain(error):  # a traceback shows them too
        each.args = tuple(arg.replace(secret, "<token>") if isinstance(arg, str) else arg for arg in each.args)
    return kind(message.replace(secret, "<token>"))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and all that it was raised from."""
    seen: list[BaseException] = []
    waiting = [error]
    while waiting:
        each = waiting.pop()
        if each is not None and each not in seen:
            seen.append(each)
            waiting += [each.__cause__, each.__context__]
    yield from seen
