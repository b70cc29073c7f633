"""`Recipe`: the document with its ways in and out."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hf_prune.errors import RecipeError
from hf_prune.files import replace_file
from hf_prune.recipe.mistakes import rule_mistakes, schema_mistakes
from hf_prune.recipe.overrides import override_
from hf_prune.recipe.schema import RecipeDocument
from hf_prune.recipe.shipped import find_recipe
from hf_prune.recipe.sparseml import read_sparseml
from hf_prune.recipe.words import dotted, shown
from hf_prune.recipe.yaml import Document, Mistake, read_yaml, write_yaml


FILE_NAME = "recipe.yaml"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?<!\.yaml)(?<!\.yml)(@[\w./-]+)?")


class Recipe(RecipeDocument):
    """What to prune, how much, when: plain data, checked as a whole before any weight is read."""

    @classmethod
    def load(cls, recipe: Recipe | Mapping[str, Any] | str | Path) -> Recipe:
        """A recipe as it is, from a mapping, from a path, or by the name of one that is shipped.

        Args:
            recipe: any of these.

        Raises:
            RecipeError: with all mistakes.
        """
        if isinstance(recipe, Recipe):
            return recipe
        if isinstance(recipe, Mapping):
            return cls.from_dict(recipe)
        if isinstance(recipe, (str, os.PathLike)):
            return cls.from_yaml(find_recipe(str(recipe)))
        raise RecipeError(f"a recipe is a Recipe, a mapping or the path of a YAML file, not {shown(recipe)}")

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """From a YAML file.

        Args:
            path: of the file.
            overrides: `key=value`, such as `prune.0.sparsity=0.3`.

        Raises:
            RecipeError: with all mistakes.
        """
        document = read_yaml(path)
        override_(document, overrides)
        return cls._checked(document)

    @classmethod
    def from_dict(cls, document: Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
        """From a mapping as YAML would give it.

        Args:
            document: of the same shape as the YAML.
            overrides: `key=value`, such as `prune.0.sparsity=0.3`.

        Raises:
            RecipeError: with all mistakes.
        """
        checked = Document(deepcopy(document) if overrides else document)
        override_(checked, overrides)
        return cls._checked(checked)

    @classmethod
    def find(cls, where: str, overrides: Sequence[str] = ()) -> Recipe:
        """What `hf-prune run` takes: a file, a directory of a pruned model, a shipped name, `user/model[@revision]` of the Hub.

        A recipe of the Hub writes below the working directory only, and pushes only if the overrides say so.

        Args:
            where: any of these.
            overrides: `key=value`, such as `prune.0.sparsity=0.3`.

        Raises:
            RecipeError: with all mistakes.
        """
        path = find_recipe(where)
        if path.is_dir():
            return cls.from_pretrained(path, overrides)
        if path.exists() or not _HUB_ID.fullmatch(where):
            return cls.from_yaml(path, overrides)
        repo_id, _, revision = where.partition("@")
        recipe = cls.from_pretrained(repo_id, ("output.push_to_hub=false", *overrides), revision=revision or None)
        directory = Path(recipe.output.dir) if recipe.output else Path()
        given = any(override.startswith("output.dir=") for override in overrides)
        if not given and (directory.is_absolute() or ".." in directory.parts):
            raise RecipeError(
                f"output.dir: {directory} of a recipe of the Hub lies outside the working directory; say where to write "
                "with output.dir=…"
            )
        return recipe

    @classmethod
    def from_pretrained(cls, directory_or_repo: str | Path, overrides: Sequence[str] = (), **hub: Any) -> Recipe:
        """The recipe saved beside a pruned model, in a directory or on the Hub.

        Args:
            directory_or_repo: a directory, or `owner/name`.
            overrides: `key=value`, such as `prune.0.sparsity=0.3`.
            **hub: `revision`, `token` and others of `hf_hub_download`.

        Raises:
            RecipeError: there is none, it can't be reached, or with all its mistakes.
        """
        directory = Path(directory_or_repo)
        if directory.is_dir():
            return cls.from_yaml(directory / FILE_NAME, overrides)
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        from hf_prune.remote import checked_token

        hub = {**hub, "token": checked_token(hub.get("token"))}
        try:
            path = hf_hub_download(str(directory_or_repo), FILE_NAME, **hub)
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise RecipeError(
                f"{str(directory_or_repo)!r} is no directory, and no Hub repository with a {FILE_NAME} that can be "
                f"reached: {error}"
            ) from error
        return cls.from_yaml(path, overrides)

    @classmethod
    def from_sparseml(cls, path_or_text: str | Path, *, epochs: float | None = None) -> Recipe:
        """From a recipe of SparseML or llm-compressor that only prunes.

        Args:
            path_or_text: a file, or the recipe itself.
            epochs: of training, if it doesn't say.

        Raises:
            RecipeError: with all that can't be carried over.
        """
        return cls.from_dict(read_sparseml(path_or_text, epochs))

    @classmethod
    def _checked(cls, document: Document) -> Recipe:
        content = document.content
        if not isinstance(content, Mapping):
            found = "empty" if content is None else f"a {type(content).__name__}"
            mistake = Mistake((), f"the recipe is {found}; expected keys, beginning with version: 1")
            raise RecipeError(_said([*document.mistakes, mistake], document))
        mistakes = list(document.mistakes)
        recipe = None
        try:
            recipe = cls.model_validate(dict(content))
        except ValidationError as error:
            mistakes += schema_mistakes(error)
        mistakes += rule_mistakes(content)
        if mistakes or recipe is None:
            raise RecipeError(_said(mistakes, document))
        return recipe

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` reads again; what is at its default and empty is left out."""
        plain = _without_empty(self.model_dump(mode="json", exclude={"training"}))
        if self.training is not None:
            plain["training"] = dict(self.training)  # where null says something
        return plain

    def to_yaml(self, path: str | Path | None = None) -> str:
        """As YAML.

        Args:
            path: written to if given, beside it first and then renamed.

        Raises:
            OSError: it can't be written.
        """
        text = write_yaml(self.to_dict())
        if path is not None:
            path = Path(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, text)
        return text

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """The JSON Schema that editors use."""
        schema = RecipeDocument.model_json_schema()
        return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "hf_prune recipe"}


def _said(mistakes: Sequence[Mistake], document: Document) -> str:
    """All mistakes, in the order of the file, then those of overrides."""
    lines: dict[str, tuple[float, int]] = {}
    for mistake in mistakes:
        where, order = _where(mistake, document)
        about = f"{dotted(mistake.path)}: " if mistake.path else ""
        lines.setdefault(f"{where}{about}{mistake.text}", order or (math.inf, 0))
    ordered = sorted(lines, key=lines.__getitem__)
    if len(ordered) == 1:
        return ordered[0]
    return f"the recipe has {len(ordered)} mistakes:\n" + "\n".join(f"  {line}" for line in ordered)


def _where(mistake: Mistake, document: Document) -> tuple[str, tuple[int, int] | None]:
    """The place of a mistake, as text and for sorting: its own, or that of the nearest key around it."""
    path, place, origin = mistake.path, mistake.place, mistake.origin
    while place is None and origin is None:
        place, origin = document.places.get(path), document.origins.get(path)
        if not path:
            break
        path = path[:-1]
    if origin is not None:
        return f"override {origin!r}: ", None
    if document.source is None:
        return "", None
    place = place or (1, 1)
    return f"{document.source}:{place[0]}:{place[1]}: ", place


def _without_empty(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_empty(item) for key, item in value.items() if item is not None and item != []}
    return [_without_empty(item) for item in value] if isinstance(value, list) else value
