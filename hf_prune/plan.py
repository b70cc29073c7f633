"""The plan: the waist of the library. All above decides and leaves the model untouched; all below executes."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import hf_prune.plan_repository as plan_repository
from hf_prune.errors import CheckpointError, PruneError
from hf_prune.structure import ModelStructure


FORMAT, VERSION = "hf_prune.plan", 1
PLAIN, MASKS, REPLACEMENTS = "pruning_plan.json", "pruning_plan.safetensors", "pruning_replacements.safetensors"


@dataclass
class KeepMasks:
    """Boolean masks, True is kept. `units` by site key, shape (n_units,); `weights` by parameter name, its shape.

    What has no entry is kept whole. Masks live on the CPU; they are data, never derived from `w != 0`.
    """

    units: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)

    def __and__(self, other: KeepMasks) -> KeepMasks:
        """Kept in both: what left stays out."""
        return KeepMasks(_both(self.units, other.units), _both(self.weights, other.weights))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, KeepMasks):
            return NotImplemented
        return _equal(self.units, other.units) and _equal(self.weights, other.weights)

    def __bool__(self) -> bool:
        return any(not mask.all() for mask in (*self.units.values(), *self.weights.values()))

    @staticmethod
    def all_of(masks: Iterable[KeepMasks]) -> KeepMasks:
        """Kept in all of them."""
        kept = KeepMasks()
        for each in masks:
            kept = kept & each
        return kept


def _both(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**a, **{name: a[name] & mask if name in a else mask for name, mask in b.items()}}


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@dataclass
class PruningPlan:
    """What leaves, by step of the recipe, and the tensors that replace others; deciding is over.

    Args:
        steps: one set of keep-masks for each step.
        base: the masks that were on the model before the recipe's first plan.
        replacements: new tensors by parameter name; empty unless a method updates weights.
        added: those of them that the model has not yet: biases of linear layers.
        recipe: what it was made by.
        progress: how much of the final sparsity it reaches, in [0, 1].
        notes: what the user should hear: rounding that could not be met, rules that removed nothing.
        n_near_ties: units within float32 rounding of the cut, reported because another machine may choose differently.
        model: what it was made for.
    """

    steps: list[KeepMasks]
    base: KeepMasks = field(default_factory=KeepMasks)
    replacements: dict[str, Tensor] = field(default_factory=dict)
    added: list[str] = field(default_factory=list)
    recipe: dict[str, Any] | None = None
    progress: float = 1.0
    notes: list[str] = field(default_factory=list)
    n_near_ties: int = 0
    model: dict[str, Any] | None = None

    @property
    def masks(self) -> KeepMasks:
        """Everything kept after this plan."""
        return KeepMasks.all_of([self.base, *self.steps])

    def require_model(self, model: nn.Module) -> None:
        """Check that the plan was made for a model of these shapes. A plan that doesn't say fits any.

        Args:
            model: that it is to be applied to.

        Raises:
            PruneError: naming the first weight that differs.
        """
        shapes = {name: list(weight.shape) for name, weight in model.named_parameters(remove_duplicate=False)}
        for name, shape in (self.model or {"shapes": {}})["shapes"].items():
            if shapes.get(name) != shape:
                found = f"{shapes[name]} here" if name in shapes else "not here"
                raise PruneError(
                    f"the plan was made for a {(self.model or {})['class']} whose {name} is {shape}; it is {found}, in "
                    f"{type(model).__name__}. Apply it to a model of the same sizes, before that is shrunk, or make a new plan"
                )

        about = self.model or {}
        expected = about.get("weights_sha256")
        if expected is not None and plan_repository.weights_digest(model) != expected:
            raise PruneError(
                f"the plan was made for the weights of {about['base_model']} at {about['commit']}; those of this {type(model).__name__} are others. Load that "
                "with `plan.load_base()`, and apply the plan before anything else changes it, or make a new plan"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain data: all but the tensors, of which it says how many entries are kept of how many."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "recipe": self.recipe,
            "progress": self.progress,
            "notes": list(self.notes),
            "n_near_ties": self.n_near_ties,
            "model": self.model,
            "base": _counts(self.base),
            "steps": [_counts(masks) for masks in self.steps],
            "replacements": {name: list(tensor.shape) for name, tensor in self.replacements.items()},
            **({"added": list(self.added)} if self.added else {}),
        }

    def mask_tensors(self) -> dict[str, Tensor]:
        """The masks of `base` and each step under one name each, `part|kind|key`, as they are stored."""
        parts = {"base": self.base, **{str(number): masks for number, masks in enumerate(self.steps)}}
        return {
            f"{part}|{kind}|{key}": keep.clone()  # several may share memory, which the format has no word for
            for part, masks in parts.items()
            for kind, group in (("units", masks.units), ("weights", masks.weights))
            for key, keep in group.items()
        }

    @classmethod
    def from_parts(
        cls, plain: Mapping[str, Any], masks: Mapping[str, Tensor], replacements: Mapping[str, Tensor] | None = None
    ) -> PruningPlan:
        """From `to_dict()`, `mask_tensors()` and the replacements.

        Args:
            plain: from `to_dict`.
            masks: from `mask_tensors`.
            replacements: the plan's `replacements`.

        Raises:
            ValueError: they don't fit together; also KeyError, TypeError, AttributeError.
        """
        parts = {part: KeepMasks() for part in ("base", *map(str, range(len(plain["steps"]))))}
        for name, keep in masks.items():
            part, kind, key = name.split("|", 2)
            group = {"units": parts[part].units, "weights": parts[part].weights}[kind]
            if keep.dtype != torch.bool:
                raise ValueError(f"the mask {name} is {keep.dtype}; expected torch.bool")
            group[key] = keep
        kept = {name: plain[name] for name in ("recipe", "progress", "notes", "n_near_ties", "model")}
        kept["added"] = list(plain.get("added", []))
        return cls(base=parts.pop("base"), steps=list(parts.values()), replacements=dict(replacements or {}), **kept)

    def save(self, directory: str | Path) -> None:
        """Write the plan into `directory`: masks and replacements as safetensors, the rest as JSON, whole or not at all.

        Args:
            directory: made if it isn't there.

        Raises:
            CheckpointError: writing failed (a full disk); a plan that was there may need saving again.
        """
        tensors = {MASKS: self.mask_tensors()}
        if self.replacements:
            tensors[REPLACEMENTS] = {name: value.contiguous() for name, value in self.replacements.items()}
        write_files(Path(directory), PLAIN, self.to_dict(), tensors)

    @classmethod
    def load(cls, directory: str | Path) -> PruningPlan:
        """Read what `save` wrote.

        Args:
            directory: that it was saved to.

        Raises:
            CheckpointError: it isn't there, is damaged, or newer than this package reads.
        """
        directory = Path(directory)
        plain, tensors = read_files(directory, PLAIN, VERSION, (MASKS, REPLACEMENTS))
        try:
            if plain["format"] != FORMAT:
                raise ValueError(f"its format is {plain['format']!r}; expected {FORMAT!r}")
            plan = cls.from_parts(plain, tensors[MASKS], tensors.get(REPLACEMENTS))
            if plan.to_dict() != plain:
                raise ValueError("the masks and replacements beside it are others than it describes")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{directory / PLAIN} is damaged ({type(error).__name__}: {error}). Make the plan again."
            ) from error
        return plan

    def push_to_hub(
        self,
        repo_id: str,
        model: nn.Module,
        *,
        base_model: str | None = None,
        base_revision: str | None = None,
        private: bool = True,
        token: str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str = "Upload pruning plan",
    ) -> str:
        """Push the plan by itself: masks, replacements, recipe and a card, in one commit; a small repository.

        Args:
            repo_id: `name` or `owner/name`; created if it doesn't exist.
            model: what the plan was made for, not yet changed: its weights are hashed, and `apply_` compares.
            base_model: the Hub id of those weights, by default where `model` was loaded from.
            base_revision: the branch, tag or commit there, `main` by default; the plan names the commit.
            private: whether a new repository is private.
            token: of the Hub; by default the one that you are logged in with.
            revision: the branch to push to.
            create_pr: open a pull request.
            commit_message: of the commit.

        Returns:
            The address of the repository, or of the pull request.

        Raises:
            PruneError: `model` is another one or comes from no repository, or the Hub refuses or can't be reached.
        """
        from hf_prune.recipe import Recipe

        self.require_model(model)
        base, commit = plan_repository.base_of(model, base_model, base_revision, token)
        about = {"base_model": base, "commit": commit, "weights_sha256": plan_repository.weights_digest(model)}
        with tempfile.TemporaryDirectory(prefix="hf_prune-") as scratch:
            named = self.model or {"class": type(model).__name__, "model_type": None, "shapes": {}}
            replace(self, model={**named, **about}).save(scratch)
            if self.recipe:
                Recipe.from_dict(self.recipe).to_yaml(Path(scratch, "recipe.yaml"))
            return plan_repository.push(
                Path(scratch),
                repo_id,
                base,
                commit,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message,
            )

    @classmethod
    def from_pretrained(cls, directory_or_repo: str | Path, **hub: Any) -> PruningPlan:
        """Read what `push_to_hub` or `save` wrote, from the Hub or a directory.

        Args:
            directory_or_repo: a directory, or `owner/name`.
            **hub: `revision`, `token` and others of `hf_hub_download`.

        Raises:
            CheckpointError: there is none, it is damaged, or newer than this package reads.
        """
        if Path(directory_or_repo).is_dir():
            return cls.load(directory_or_repo)
        return cls.load(plan_repository.fetch(str(directory_or_repo), (PLAIN, MASKS, REPLACEMENTS), **hub))

    def load_base(self, **options: Any) -> Any:
        """The model that a plan of the Hub was made for, at that commit, for `apply_`.

        Args:
            **options: of `from_pretrained`, such as `token` or `device_map`.

        Raises:
            PruneError: the plan doesn't say, or names a class that isn't Transformers'.
        """
        return plan_repository.load_base(self.model or {}, options)


def made_for(structure: ModelStructure) -> dict[str, Any]:
    """Of a model, what a plan for it depends on: its class, and the shape of every weight that can be pruned."""
    return {
        "class": structure.model_class,
        "model_type": structure.model_type,
        "shapes": {site.name: list(site.shape) for site in structure.weights},
    }


def _counts(masks: KeepMasks) -> dict[str, dict[str, int]]:
    groups = {**masks.units, **masks.weights}
    return {key: {"of": keep.numel(), "kept": int(keep.sum())} for key, keep in groups.items()}


# --------------------------------------------------------------------------------------------------------------
# files


def write_files(
    directory: Path, plain_name: str, plain: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Write beside, then rename; the JSON last, with a digest of each tensor file, so that it is known what belongs to it.

    Args:
        directory: made if it isn't there.
        plain_name: of the JSON file.
        plain: what goes into it.
        tensors: by name of the safetensors file.

    Raises:
        CheckpointError: writing failed.
    """
    beside = {name: directory / f".{name}.partial" for name in (*tensors, plain_name)}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        digests = {}
        for name, held in tensors.items():
            save_file(dict(held), beside[name])
            digests[name] = _digest(beside[name])
        beside[plain_name].write_text(json.dumps({**plain, "files": digests}, indent=2), encoding="utf-8")
        for name, path in beside.items():
            os.replace(path, directory / name)
    except (OSError, SafetensorError) as error:
        for path in beside.values():
            path.unlink(missing_ok=True)
        raise CheckpointError(
            f"writing {plain_name} to {directory} failed: {error}. Free some space or choose another directory."
        ) from error


def read_files(
    directory: Path, plain_name: str, version: int, tensor_names: Iterable[str]
) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """What `write_files` wrote: the plain part, and of `tensor_names` the files that belong to it.

    Raises:
        CheckpointError: a file is missing, damaged, of another save than the JSON, or newer than `version`.
    """
    path = directory / plain_name
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        digests = plain.pop("files")
        if type(plain["version"]) is int and plain["version"] > version:
            raise CheckpointError(f"{path} has version {plain['version']}; this reads {version}. Upgrade hf_prune.")
        if plain["version"] != version:
            raise ValueError(f"its version is {plain['version']!r}")
        tensors = {}
        for name in [name for name in tensor_names if name in digests]:
            path = directory / name
            if _digest(path) != digests[name]:
                raise ValueError(f"it was changed, or isn't the one that {plain_name} was written with")
            tensors[name] = load_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no {path}; give the directory that it was saved to") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged ({error}). Use another copy of {directory}.") from error
    return plain, tensors


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
