"""Two inert patches on `PreTrainedModel`: they act on a model whose config or object carries pruning, on no other.

The load hook is keyed on the config, so it survives deepcopy, PEFT and unwrapping.
"""

from __future__ import annotations

import functools
import inspect
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_prune.checkpoint.modeling_hf_prune import ManifestError, resize_
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


def _loading(stock: Any) -> Any:
    @functools.wraps(stock)
    def post_init(self: PreTrainedModel) -> None:
        manifest = getattr(self.config, "hf_prune", None)
        if manifest is not None:
            _check_files(self)
            try:
                resize_(self, manifest)
            except ManifestError as error:
                raise CheckpointError(str(error)) from error
        stock(self)

    post_init._hf_prune = True  # type: ignore[attr-defined]
    return post_init


def _check_files(model: PreTrainedModel) -> None:
    """Of a model that is about to be loaded from a local directory: whether its weight files are whole."""
    from hf_prune.checkpoint.saving import check_weights

    directory = getattr(model.config, "name_or_path", None)
    being_loaded = any(parameter.is_meta for parameter in model.parameters())
    if being_loaded and directory and Path(directory).is_dir():
        check_weights(Path(directory))


def _saving(stock: Any) -> Any:
    @functools.wraps(stock)
    def save_pretrained(self: PreTrainedModel, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        # imported here: a program that only loads needs none of it
        from hf_prune.checkpoint.saving import is_pruned, save_staged

        if not is_pruned(self):
            return stock(self, save_directory, *args, **kwargs)
        call = inspect.signature(stock).bind(self, save_directory, *args, **kwargs).arguments
        call.pop("self")
        directory = Path(call.pop("save_directory"))
        options = {**call, **call.pop("kwargs", {})}
        push = options.pop("push_to_hub", False)
        result = save_staged(functools.partial(stock, self), self, directory, options)
        if push:
            accepted = inspect.signature(self.push_to_hub).parameters
            repo_id = options.pop("repo_id", directory.absolute().name)
            self.push_to_hub(repo_id, **{name: options[name] for name in options if name in accepted})
        return result

    return save_pretrained
