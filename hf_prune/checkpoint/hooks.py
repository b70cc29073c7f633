"""Three inert patches on `PreTrainedModel`: they act on a model whose config or object carries pruning, on no other.

The load hook is keyed on the config, so it survives deepcopy, PEFT and unwrapping.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_prune.checkpoint.modeling_hf_prune import ManifestError, resize_
from hf_prune.checkpoint.saving import ARTIFACTS, save_staged
from hf_prune.errors import CheckpointError


if TYPE_CHECKING:
    from transformers import PreTrainedModel


def install() -> None:
    """Let Transformers load and save pruned checkpoints. Calling it again does nothing."""
    # imported here because this runs at the very end of that module's own import
    from transformers.modeling_utils import PreTrainedModel

    if hasattr(PreTrainedModel.post_init, "_hf_prune"):
        return
    PreTrainedModel.post_init = _loading(PreTrainedModel.post_init)
    PreTrainedModel.save_pretrained = _saving(PreTrainedModel.save_pretrained)
    PreTrainedModel._upload_modified_files = _uploading(PreTrainedModel._upload_modified_files)


def _loading(stock: Any) -> Any:
    @functools.wraps(stock)
    def post_init(self: PreTrainedModel) -> None:
        manifest = getattr(self.config, "hf_prune", None)
        if manifest is not None:
            try:
                resize_(self, manifest)
            except ManifestError as error:
                raise CheckpointError(str(error)) from error
        stock(self)

    post_init._hf_prune = True  # type: ignore[attr-defined]
    return post_init


def _saving(stock: Any) -> Any:
    @functools.wraps(stock)
    def save_pretrained(self: PreTrainedModel, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        artifacts = self.__dict__.get(ARTIFACTS)
        if artifacts is None and getattr(self.config, "hf_prune", None) is None:
            return stock(self, save_directory, *args, **kwargs)
        if kwargs.pop("push_to_hub", False):
            repo_id = kwargs.pop("repo_id", Path(save_directory).name)
            save_staged(functools.partial(stock, self), self, Path(save_directory), args, kwargs)
            return self.push_to_hub(repo_id)
        return save_staged(functools.partial(stock, self), self, Path(save_directory), args, kwargs)

    return save_pretrained


def _uploading(stock: Any) -> Any:
    @functools.wraps(stock)
    def _upload_modified_files(self: PreTrainedModel, working_dir: str | os.PathLike, *args: Any, **kw: Any) -> Any:
        artifacts = self.__dict__.get(ARTIFACTS) or {}
        if "README.md" in artifacts:
            # `push_to_hub` has just put its own card over the one that was saved
            Path(working_dir, "README.md").write_text(artifacts["README.md"], encoding="utf-8")
        return stock(self, working_dir, *args, **kw)

    return _upload_modified_files
