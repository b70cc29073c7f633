"""`push_to_hub` of a pruned model: our card, one commit without stale weights, errors that say what to do.

Two patches on `PreTrainedModel` and one on `Trainer`, inert for a model that carries no pruning, beside those of
`hf_prune.checkpoint.hooks`.
"""

from __future__ import annotations

import functools
import inspect
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from transformers import PreTrainedModel, Trainer


def install() -> None:
    """Let pruned models push themselves. Calling it again does nothing."""
    # imported here because this runs at the very end of that module's own import
    from transformers.modeling_utils import PreTrainedModel

    if hasattr(PreTrainedModel.push_to_hub, "_hf_prune"):
        return
    PreTrainedModel.push_to_hub = _pushing(PreTrainedModel.push_to_hub)
    PreTrainedModel._upload_modified_files = _uploading(PreTrainedModel._upload_modified_files)


def install_trainer() -> None:
    """Let no trainer write its own card over that of a pruned model. Calling it again does nothing."""
    from transformers.trainer import Trainer

    if not hasattr(Trainer.create_model_card, "_hf_prune"):
        Trainer.create_model_card = _writing_card(Trainer.create_model_card)


def _pushing(stock: Any) -> Any:
    @functools.wraps(stock)
    def push_to_hub(self: PreTrainedModel, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        from huggingface_hub.errors import HFValidationError, HTTPError

        from hf_prune.checkpoint.saving import is_pruned
        from hf_prune.remote import checked_token, explained

        if not is_pruned(self):
            return stock(self, repo_id, *args, **kwargs)
        kwargs["token"] = checked_token(kwargs.get("token"))
        try:
            return stock(self, repo_id, *args, **kwargs)
        except (HTTPError, HFValidationError, OSError) as error:
            raise explained(error, f"the {type(self).__name__}", repo_id, kwargs["token"]) from error

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


def _writing_card(stock: Any) -> Any:
    @functools.wraps(stock)
    def create_model_card(self: Trainer, *args: Any, **kwargs: Any) -> None:
        from hf_prune.checkpoint.saving import ARTIFACTS
        from hf_prune.hub.push import card_for
        from hf_prune.training.pruner import unwrap

        card = (unwrap(self.model).__dict__.get(ARTIFACTS) or {}).get("README.md")
        if card is None:
            stock(self, *args, **kwargs)
        elif self.is_world_process_zero():
            if self.args.push_to_hub and self.hub_model_id:
                card = card_for(card, self.hub_model_id, token=self.args.hub_token, revision=self.args.hub_revision)
            Path(self.args.output_dir, "README.md").write_text(card, encoding="utf-8")

    create_model_card._hf_prune = True  # type: ignore[attr-defined]
    return create_model_card


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
