"""A plan as a small repository of the Hub: what it holds, and the base model that it is applied to."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCardData,
    ModelInfo,
    snapshot_download,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from torch import Tensor, nn

from hf_prune.errors import CheckpointError, PruneError
from hf_prune.remote import ERRORS, HUB_ID, address_of, checked_token, explained, make_commit


CARD = "README.md"
_TEXT = """---
{header}---

# {name}

A pruning plan for `{base_model}` at commit `{commit}`: which units and weights leave, and no weights of the model itself
but those that are replaced. The weights that it is applied to are compared by their hash.

```python
import hf_prune

plan = hf_prune.PruningPlan.from_pretrained("{repo_id}")
model = plan.load_base()
hf_prune.apply_(model, plan)
hf_prune.shrink_(model)
```
"""


def base_of(
    model: nn.Module, base_model: str | None, revision: str | None, token: str | bool | None
) -> tuple[str, str]:
    """The repository that a model's weights are in, and the commit that its `revision` is at now.

    Raises:
        PruneError: the model comes from no repository and none was given, or it can't be seen.
    """
    loaded_from = getattr(getattr(model, "config", None), "_name_or_path", "")  # Transformers keeps no revision
    base = base_model or loaded_from or ""
    if not HUB_ID.fullmatch(base) or Path(base).exists():
        raise PruneError(
            f"the plan's model comes from {base or 'nowhere'!r}, which is no repository of the Hub; say in which one its "
            "weights are with base_model='owner/name'"
        )
    token = checked_token(token)
    try:
        return base, str(HfApi(token=token, library_name="hf_prune").model_info(base, revision=revision).sha)
    except ERRORS as error:
        raise explained(error, f"the plan for {base}", base, token) from error


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of all parameters in float32, names and shapes included: loading in float32 what is saved in less changes nothing.

    Raises:
        PruneError: they aren't here (on the meta device) or not whole.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        if weight.is_meta or type(weight.data) is not Tensor:
            raise PruneError(f"{name} isn't whole in memory; load the model without sharding or offloading")
        value = weight.detach().to("cpu", torch.float32 if weight.is_floating_point() else weight.dtype).contiguous()
        digest.update(f"{name} {list(value.shape)}".encode())
        digest.update(value.numpy().data)
    return digest.hexdigest()


def push(
    folder: Path,
    repo_id: str,
    base_model: str,
    commit: str,
    *,
    private: bool,
    token: str | None,
    revision: str | None,
    create_pr: bool,
    commit_message: str,
) -> str:
    """Send the files of a folder and a card, in one commit; see `PruningPlan.push_to_hub`."""

    def operations(api: HfApi, name: str, found: ModelInfo) -> list[CommitOperationAdd | CommitOperationDelete]:
        there = {sibling.rfilename for sibling in found.siblings or []}
        added = [CommitOperationAdd(path.name, path) for path in sorted(folder.iterdir())]
        if CARD not in there:  # what is there a person may have written into
            added.append(CommitOperationAdd(CARD, _card(name, base_model, commit).encode()))
        # replacements of an earlier plan
        stale = sorted(each for each in there if each.endswith(".safetensors") and not (folder / each).exists())
        return [*added, *map(CommitOperationDelete, stale)]

    made = make_commit(
        repo_id,
        operations,
        "the plan",
        private=private,
        token=token,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message,
    )
    return address_of(made, revision, create_pr)


def fetch(repo_id: str, names: Sequence[str], **hub: Any) -> Path:
    """The files of a plan, in the cache."""
    hub = {**hub, "token": checked_token(hub.get("token"))}
    try:
        return Path(snapshot_download(repo_id, allow_patterns=list(names), **hub))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(
            f"{repo_id!r} is no directory, and no Hub repository with a {names[0]} that can be reached: {error}"
        ) from error


def load_base(about: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    """See `PruningPlan.load_base`."""
    import transformers

    base = about.get("base_model")
    if not isinstance(base, str) or not HUB_ID.fullmatch(base):
        raise PruneError(
            f"the plan doesn't say which model of the Hub it is for ({base!r}); load it and call `apply_`"
        )
    found = getattr(transformers, str(about.get("class")), None)
    # a file of the Hub names it: nothing but a model of Transformers is called
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise PruneError(
            f"the plan is for a {about.get('class')!r}, which Transformers doesn't have; load it and call `apply_`"
        )
    model_class: Any = found
    return model_class.from_pretrained(base, **{"revision": about.get("commit") or "main", **options})


def _card(repo_id: str, base_model: str, commit: str) -> str:
    header = ModelCardData(base_model=base_model, library_name="hf_prune", tags=["hf_prune", "pruning-plan"]).to_yaml()
    return _TEXT.format(
        header=f"{header}\n", name=repo_id.partition("/")[2], base_model=base_model, commit=commit, repo_id=repo_id
    )
