"""What all that pushes to the Hub has in common: how its errors are told. No token is ever in them."""

from __future__ import annotations

from huggingface_hub import get_token

# `HTTPError` is the base of the HTTP library's errors (httpx, later httpx2), which the hub re-exports by importing it.
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from hf_prune.errors import CheckpointError, PruneError


# What a push may raise: of a failed LFS upload a RuntimeError, of a header that is refused a ValueError.
ERRORS = (HTTPError, OSError, ValueError, RuntimeError)


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
    secret = token if isinstance(token, str) else get_token()
    return kind(message.replace(secret, "<token>") if secret else message)
