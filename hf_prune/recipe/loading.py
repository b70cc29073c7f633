"""`Recipe`: the document with its ways in and out."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from hf_prune.errors import RecipeError
from hf_prune.recipe.mistakes import dotted, messages, training_mistakes
from hf_prune.recipe.schema import RecipeDocument
from hf_prune.recipe.shipped import find_recipe
from hf_prune.recipe.yaml import Places, read_yaml, scalar


FILE_NAME = "recipe.yaml"


class Recipe(RecipeDocument):
    """What to prune, how much, when: plain data, checked as a whole before any weight is read."""

    @classmethod
    def load(cls, recipe: Recipe | Mapping[str, Any] | str | Path) -> Recipe:
        """A recipe as it is, from a mapping, from a path, or by the name of one that is shipped.

        Raises:
            RecipeError: with all mistakes.
        """
        if isinstance(recipe, Recipe):
            return recipe
        return cls.from_dict(recipe) if isinstance(recipe, Mapping) else cls.from_yaml(find_recipe(str(recipe)))

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """From a YAML file, with `key=value` overrides such as `prune.0.sparsity=0.3`."""
        document, places = read_yaml(path)
        return cls._checked(apply_overrides(document, overrides), str(path), places)

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Recipe:
        """From a mapping as YAML would give it."""
        return cls._checked(document, None, {})

    @classmethod
    def from_pretrained(cls, directory_or_repo: str | Path, **hub: Any) -> Recipe:
        """The recipe saved beside a pruned model, in a directory or on the Hub (`revision=`, `token=`)."""
        directory = Path(directory_or_repo)
        if directory.is_dir():
            return cls.from_yaml(directory / FILE_NAME)
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            return cls.from_yaml(hf_hub_download(str(directory_or_repo), FILE_NAME, **hub))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise RecipeError(
                f"{str(directory_or_repo)!r} is no directory, and no Hub repository with a {FILE_NAME} that can be "
                f"reached: {error}"
            ) from error

    @classmethod
    def _checked(cls, document: Any, source: str | None, places: Places) -> Recipe:
        def where(path: tuple[str | int, ...]) -> str:
            if source is None:
                return ""
            while path and path not in places:
                path = path[:-1]
            return f"{source}:{places.get(path, '1:1')}: "

        if not isinstance(document, Mapping):
            found = "empty" if document is None else f"a {type(document).__name__}"
            raise RecipeError(f"{source or 'the recipe'} is {found}; expected keys, beginning with version: 1")
        lines: list[str] = []
        recipe = None
        try:
            recipe = cls.model_validate(document)
        except ValidationError as error:
            lines += messages(error, document, where)
        training = document.get("training")
        lines += training_mistakes(training if isinstance(training, Mapping) else None, where)
        if lines or recipe is None:
            count = f"{len(lines)} mistakes" if len(lines) > 1 else "a mistake"
            raise RecipeError(f"the recipe has {count}:\n" + "\n".join(f"  {line}" for line in lines))
        return recipe

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` reads again; what is at its default and empty is left out."""
        return _without_empty(self.model_dump(mode="json"))

    def to_yaml(self, path: str | Path | None = None) -> str:
        """As YAML; written to `path` if given, beside it first and then renamed."""
        text = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)
        if path is not None:
            path = Path(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, beside = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(beside, path)
        return text

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """The JSON Schema that editors use."""
        return {"$schema": "https://json-schema.org/draft/2020-12/schema", **RecipeDocument.model_json_schema()}


def apply_overrides(document: Any, overrides: Sequence[str]) -> Any:
    """A copy of `document` with each `key.path=value` set; list elements by number, and they must exist.

    Raises:
        RecipeError: an override that is no assignment or leads nowhere.
    """
    import copy

    document = copy.deepcopy(document)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise RecipeError(f"{override!r} is no override; expected key=value, such as prune.0.sparsity=0.3")
        at, path = document, key.split(".")
        for depth, part in enumerate(path):
            last = depth == len(path) - 1
            if isinstance(at, list):
                if not part.isdigit() or int(part) >= len(at):
                    raise RecipeError(f"{override!r}: {dotted(tuple(path[:depth]))} has elements 0 to {len(at) - 1}")
                place: Any = int(part)
            elif isinstance(at, dict):
                place = part
                if not last:
                    at.setdefault(part, {})
            else:
                raise RecipeError(f"{override!r}: {dotted(tuple(path[:depth]))} is {at!r} and has no keys")
            if last:
                at[place] = scalar(text)
            else:
                at = at[place]
    return document


def _without_empty(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_empty(item) for key, item in value.items() if item is not None and item != []}
    return [_without_empty(item) for item in value] if isinstance(value, list) else value
