"""`hf-prune push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def push(
    directory: Annotated[Path, typer.Argument(help="The directory of a pruned model.")],
    repo: Annotated[str, typer.Argument(help="owner/name on the Hub; made if it isn't there.")],
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public.")] = False,
    revision: Annotated[str | None, typer.Option(help="The branch to push to.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    message: Annotated[str, typer.Option(help="The commit's message.")] = "Upload pruned model",
) -> None:
    """Push a saved model to the Hub in one commit: weights, config, tokenizer, recipe, report, card.

    The token is that of `hf auth login`, or HF_TOKEN.

    Examples:

    ```
    hf-prune push outputs/quickstart me/minilm-bbc-pruned
    hf-prune push outputs/quickstart me/minilm-bbc-pruned --create-pr
    ```
    """
    from hf_prune.hub.push import push_folder

    address = push_folder(
        directory, repo, private=not public, revision=revision, create_pr=create_pr, commit_message=message
    )
    typer.echo(address)
