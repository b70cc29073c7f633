"""`push_to_hub` of a pruned model: our card, one commit without stale weights, errors that say what to do.

Two patches on `PreTrainedModel`, inert for a model that carries no pruning, beside those of `hf_prune.checkpoint.hooks`.
"""

from __future__ import annotations

import functools
import inspect
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from transformers import PreTrainedModel


def install() -> None:
    """Let pruned models push themselves. Calling it again does nothing."""
    # imported here because this runs at the very end of that module's own import
    from transformers.modeling_utils import PreTrainedModel

    if hasattr(PreTrainedModel.push_to_hub, "_hf_prune"):
        return
    PreTrainedModel.push_to_hub = _pushing(PreTrainedModel.push_to_hub)
    PreTrainedModel._upload_modified_files = _uploading(PreTrainedModel._upload_modified_files)


def _pushing(stock: Any) -> Any:
    @functools.wraps(stock)
    def push_to_hub(self: PreTrainedModel, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        from huggingface_hub.errors import HFValidationError, HTTPError

        from hf_prune.checkpoint.saving import is_pruned
        from hf_prune.hub.push import explained

        if not is_pruned(self):
            return stock(self, repo_id, *args, **kwargs)
        try:
            return stock(self, repo_id, *args, **kwargs)
        except (HTTPError, HFValidationError, OSError) as error:
            raise explained(error, f"the {type(self).__name__}", repo_id, kwargs.get("token")) from error

    push_to_hub._hf_prune = True  # type: ignore[attr-defined]
    return push_to_hub


def _uploading(stock: Any) -> Any:
    @functools.wraps(stock)
    def _upload_modified_files(self: PreTrainedModel, working_dir: str | os.PathLike, *args: Any, **kw: Any) -> Any:
        from hf_prune.checkpoint.saving import add_side_files, is_pruned
        from hf_prune.hub.push import send

        if not is_pruned(self):
            return stock(self, working_dir, *args, **kw)
        call = inspect.signature(stock).bind(self, working_dir, *args, **kw).arguments
        folder = Path(working_dir)
        card = folder / "README.md"
        tags = _tags(card)
        # `push_to_hub` has just put its own card over the one that was saved
        add_side_files(self, folder)
        _add_tags(card, tags)
        options = ("token", "create_pr", "revision", "commit_description")
        return send(
            folder,
            call["repo_id"],
            private=None,  # `push_to_hub` has made the repository
            commit_message=call.get("commit_message") or "Upload pruned model",
            **{name: call[name] for name in options if name in call},
        )

    return _upload_modified_files


def _tags(card: Path) -> list[str]:
    from huggingface_hub import ModelCard

    return list(ModelCard.load(card).data.tags or []) if card.exists() else []


def _add_tags(card: Path, tags: list[str]) -> None:
    """The tags that the user gave (`add_model_tags`, `tags=`), after those of the card."""
    from huggingface_hub import ModelCard

    if card.exists():
        loaded = ModelCard.load(card)
        loaded.data.tags = list(dict.fromkeys([*(loaded.data.tags or []), *tags]))
        loaded.save(card)
