"""Recipes of SparseML and llm-compressor that only prune, as ours. Strict: what can't be carried over is a mistake.

Their YAML names classes by tags (`!GMPruningModifier`) or by keys; here both are names in plain data, looked up in `_READERS`. Nothing
is constructed from them, and expressions (`eval(…)`) aren't evaluated, but for one that is the name of a variable.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from hf_prune.errors import RecipeError
from hf_prune.recipe.fields import is_number
from hf_prune.recipe.words import nearest, shown
from hf_prune.recipe.yaml import LARGEST


# options that change how something is computed or told, never what leaves
_OF_NO_ACCOUNT = frozenset({"log_types", "offload_hessians", "sequential_targets"})
# what a modifier takes, with the value that says nothing (None: has no such value)
_GRADUAL: dict[str, Any] = {
    "init_sparsity": None, "final_sparsity": None, "start_epoch": None, "end_epoch": None, "update_frequency": None, "params": None,
    "inter_func": "cubic", "mask_type": "unstructured", "leave_enabled": True, "global_sparsity": False, "phased": False,
    "score_type": "magnitude",
}  # fmt: skip
_ONE_SHOT: dict[str, Any] = {
    "sparsity": None, "mask_structure": "0:0", "targets": "Linear", "ignore": [], "sequential_update": True, "sparsity_profile": None,
    "owl_m": None, "owl_lmbda": None,
}  # fmt: skip

Step = dict[str, Any]


def read_sparseml(recipe: str | Path, epochs: float | None = None) -> dict[str, Any]:
    """A document for `Recipe.from_dict`.

    Args:
        recipe: a path, or the text itself if it has more than one line; a Markdown page with the recipe between lines of `---` too.
        epochs: of training, of which starts and ends become fractions, where no EpochRangeModifier says it.

    Raises:
        RecipeError: it can't be read, or it says something that can't be carried over; with all that is so.
    """
    text = _text_of(recipe)
    try:
        content = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"not a recipe of SparseML or llm-compressor: {error}") from error
    if not isinstance(content, Mapping):
        raise RecipeError(
            f"not a recipe of SparseML or llm-compressor: expected keys such as modifiers, found {shown(content)}"
        )
    import_ = _Import(content, epochs)
    import_.run()
    if import_.mistakes:
        lines = "\n".join(f"  {line}" for line in import_.mistakes)
        raise RecipeError(f"{len(import_.mistakes)} of what the recipe says can't be carried over:\n{lines}")
    return import_.document()


def _text_of(recipe: str | Path) -> str:
    if isinstance(recipe, str) and "\n" in recipe:
        text = recipe
    elif isinstance(recipe, (str, os.PathLike)):
        try:
            text = Path(recipe).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise RecipeError(
                f"can't read {str(recipe)!r}: {error}. Give the path of a recipe, or its text."
            ) from error
    else:
        raise RecipeError(f"expected the path of a recipe or its text, not {shown(recipe)}")
    if len(text) > LARGEST:
        raise RecipeError(f"the recipe has more than {LARGEST:,} characters; is it one?")
    parts = re.split(r"^---\s*$", text, flags=re.MULTILINE)
    return parts[1] if len(parts) > 2 else text


class _Loader(yaml.SafeLoader):
    """SafeLoader for which a tag `!Name` makes plain data: {Name: options}."""


def _tagged(loader: Any, suffix: str, node: yaml.Node) -> dict[str, Any]:
    options = loader.construct_mapping(node, deep=True) if isinstance(node, yaml.MappingNode) else None
    return {suffix: options or {}}


_Loader.add_multi_constructor("!", _tagged)


class _Import:
    """One pass through the modifiers, with what was found and what can't be carried over."""

    def __init__(self, content: Mapping[str, Any], epochs: float | None):
        self.content = content
        self.epochs = epochs
        self.in_training: float | None = None  # epochs that the recipe itself gives
        self.steps: list[Step] = []
        self.mistakes: list[str] = []

    def run(self) -> None:
        modifiers = [
            (name, self._with_variables(name, options)) for name, options in self._modifiers(self.content, "")
        ]
        if not modifiers and not self.mistakes:
            self.mistakes.append("it holds no modifier")
        for name, options in modifiers:
            if name == "EpochRangeModifier" and is_number(options.get("end_epoch")):
                self.in_training = self.epochs = options["end_epoch"]
        for name, options in modifiers:
            if name in _READERS:
                self._read(name, options)
            elif name != "EpochRangeModifier":
                known = ("EpochRangeModifier", *_READERS)
                near = nearest(name, known)
                self.mistakes.append(
                    f"{name}: no pruning that is known here ({', '.join(known)}){near}; what trains goes into `training`"
                )

    def document(self) -> dict[str, Any]:
        training = {} if self.in_training is None else {"training": {"num_train_epochs": float(self.in_training)}}
        return {"version": 1, **training, "prune": self.steps}

    def _modifiers(self, content: Mapping[str, Any], where: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for key, value in content.items():
            path = f"{where}{key}"
            if str(key).endswith("modifiers"):
                listed = value if isinstance(value, list) else [value]
                for each in listed:
                    if not isinstance(each, Mapping):
                        self.mistakes.append(f"{path}: expected modifiers with their options, found {shown(each)}")
                        continue
                    for name, options in each.items():
                        if isinstance(options, Mapping):
                            yield str(name), dict(options)
                        else:
                            self.mistakes.append(f"{path}.{name}: expected options, found {shown(options)}")
            elif str(key).endswith("Modifier") and isinstance(value, Mapping):
                yield str(key), dict(value)
            elif isinstance(value, Mapping) and (str(key).endswith("_stage") or key == "stage"):
                yield from self._modifiers(value, f"{path}.")
            elif isinstance(value, (Mapping, list)) and key not in ("metadata", "args"):
                self.mistakes.append(f"{path}: neither modifiers nor a stage")

    def _with_variables(self, name: str, options: dict[str, Any]) -> dict[str, Any]:
        """Options with `eval(variable)` looked up."""
        variables = (
            {**self.content.get("args", {}), **self.content}
            if isinstance(self.content.get("args", {}), Mapping)
            else {}
        )
        for key, value in options.items():
            found = re.fullmatch(r"eval\(\s*(\w+)\s*\)", value) if isinstance(value, str) else None
            if found and is_number(variables.get(found[1])):
                options[key] = variables[found[1]]
            elif isinstance(value, str) and value.startswith("eval("):
                self.mistakes.append(f"{name}.{key}: {value} is not evaluated; write its value")
                options[key] = 0.0
        return options

    def _read(self, name: str, options: dict[str, Any]) -> None:
        read, known = _READERS[name]
        if name == "MagnitudePruningModifier" and "targets" in options:  # llm-compressor's words for SparseML's
            words = {"targets": "params", "start": "start_epoch", "end": "end_epoch", "update_scheduler": "inter_func",
                     "apply_globally": "global_sparsity", "mask_structure": "mask_type"}  # fmt: skip
            options = {words.get(key, key): value for key, value in options.items()}
        for key in options.keys() - known.keys() - _OF_NO_ACCOUNT:
            self.mistakes.append(f"{name}.{key}: {shown(options[key])} has no counterpart here{nearest(key, known)}")
        self.steps += read(self, name, {**known, **options})

    # the modifiers

    def gradual(self, name: str, o: dict[str, Any]) -> list[Step]:
        self._require(
            name, o, leave_enabled=(True,), phased=(False,), score_type=("magnitude",), inter_func=("cubic", "linear")
        )
        kinds: dict[Any, Any] = {"unstructured": {}, "block4": {"pattern": {"block": [1, 4]}}}
        mask = o["mask_type"]
        if mask not in kinds:
            self.mistakes.append(f"{name}.mask_type: {shown(mask)} on a ramp; known: {', '.join(kinds)}")
        first, last = (self._number(name, o, key, 0, 1) for key in ("init_sparsity", "final_sparsity"))
        begin, end = (self._fraction(name, o, key) for key in ("start_epoch", "end_epoch"))
        every = self._number(name, o, "update_frequency", 1e-9, 1e9)
        n_updates = (
            max(1, round((o["end_epoch"] - o["start_epoch"]) / every)) if None not in (begin, end, every) else 1
        )
        shared = {
            "target": "weights",
            **kinds.get(mask if isinstance(mask, str) else None, {}),
            **({"scope": "global"} if o["global_sparsity"] or name.startswith("Global") else {}),
            **self._where(name, o["params"], "params", of_parameters=True),
        }
        if None in (first, last, begin, end) or not 0 <= first < last < 1:
            if None not in (first, last):
                self.mistakes.append(
                    f"{name}: expected 0 <= init_sparsity < final_sparsity < 1, found {first} and {last}"
                )
            return []
        at_begin = {**shared, "sparsity": first, "schedule": {"name": "one_shot", "begin": begin, "end": end}}
        # of what the first step leaves: init + (1 - init) x is the whole
        ramp = {**shared, "sparsity": (last - first) / (1 - first)}
        ramp["schedule"] = {"name": o["inter_func"], "begin": begin, "end": end, "updates": n_updates}
        return [at_begin, ramp] if first else [ramp]

    def constant(self, name: str, o: dict[str, Any]) -> list[Step]:
        if not self.steps:  # else what an earlier step masked stays so by itself
            self.mistakes.append(
                f"{name}: it keeps zeros that a checkpoint came with, and here masks say what has left; prune anew, by sparsity"
            )
        return []

    def layers(self, name: str, o: dict[str, Any]) -> list[Step]:
        numbers = [re.fullmatch(r".*\.(\d+)", str(layer)) for layer in o["layers"] or ()]
        if not numbers or None in numbers:
            self.mistakes.append(
                f"{name}.layers: {shown(o['layers'])}; expected names of blocks that end in their numbers"
            )
            return []
        begin = self._fraction(name, o, "start_epoch") if is_number(o["start_epoch"]) and o["start_epoch"] > 0 else 0.0
        if is_number(o["end_epoch"]) and o["end_epoch"] >= 0:
            self.mistakes.append(
                f"{name}.end_epoch: {o['end_epoch']}: here layers that left don't come back; write -1"
            )
        remove = sorted(int(number[1]) for number in numbers if number)
        return [{"target": "layers", "remove": remove, "schedule": {"name": "one_shot", "begin": begin, "end": 1.0}}]

    def one_shot(self, name: str, o: dict[str, Any]) -> list[Step]:
        step: Step = {"target": "weights", "criterion": {"SparseGPTModifier": "sparsegpt"}.get(name, "wanda")}
        if name == "SparseGPTModifier":
            self._require(name, o, preserve_sparsity_mask=(False, None))
            renamed = {"block": o["block_size"], "damping": o["dampening_frac"]}
            step["criterion"] = {
                "name": "sparsegpt",
                **{key: value for key, value in renamed.items() if value is not None},
            }
        self._require(name, o, sequential_update=(True,), sparsity_profile=(None, "owl"))
        n, m = (
            [*map(int, found.groups())]
            if (found := re.fullmatch(r"(\d+):(\d+)", str(o["mask_structure"])))
            else (-1, -1)
        )
        sparsity = self._number(name, o, "sparsity", 0, 1) if (n, m) == (0, 0) or o["sparsity"] is not None else n / m
        if (n, m) == (0, 0):
            step["sparsity"] = sparsity
        elif 2 * n == m:
            step["pattern"] = f"{n}:{m}"
            if sparsity not in (None, 0.5):
                self.mistakes.append(f"{name}.sparsity: {sparsity} with {n}:{m}, which is 0.5")
        else:
            # the modifiers' own words differ on which of N:M is kept
            self.mistakes.append(
                f"{name}.mask_structure: {shown(o['mask_structure'])}; only unstructured and half of a group go over"
            )
        if o["sparsity_profile"] == "owl" or o["owl_m"] is not None or o["owl_lmbda"] is not None:
            renamed = {"multiple": o["owl_m"], "spread": o["owl_lmbda"]}
            step["allocation"] = {"name": "owl", **{key: value for key, value in renamed.items() if value is not None}}
        step["schedule"] = {"name": "one_shot", "begin": 0.0, "end": 1.0}
        step |= self._where(name, o["targets"], "targets")
        left_out = [
            _glob(each) for each in _listed(o["ignore"]) if not re.fullmatch(r"(re:\.\*)?lm_head\$?", str(each))
        ]
        if None in left_out:
            self.mistakes.append(f"{name}.ignore: {shown(o['ignore'])} holds an expression that no glob says")
        return [{**step, **({"exclude": left_out} if left_out else {})}]  # output heads are left out anyway

    # what they share

    def _require(self, name: str, o: Mapping[str, Any], **allowed: tuple[Any, ...]) -> None:
        for key, values in allowed.items():
            if o[key] not in values:
                said = " or ".join(str(value) for value in values if value is not None)
                self.mistakes.append(f"{name}.{key}: {shown(o[key])}; only {said} can be carried over")

    def _number(self, name: str, o: Mapping[str, Any], key: str, least: float, most: float) -> Any:
        if is_number(o[key]) and least <= o[key] <= most:
            return float(o[key])
        self.mistakes.append(f"{name}.{key}: {shown(o[key])}; expected a number from {least:g} to {most:g}")
        return None

    def _fraction(self, name: str, o: Mapping[str, Any], key: str) -> Any:
        value = self._number(name, o, key, 0, 1e9)
        if value is None:
            return None
        if self.epochs is None:
            line = "no EpochRangeModifier says how long training is; pass epochs="
            self.mistakes += [] if line in self.mistakes else [line]
            return None
        if value > self.epochs:
            self.mistakes.append(f"{name}.{key}: {value:g} is after the end of training at {self.epochs:g}")
            return None
        return value / self.epochs

    def _where(self, name: str, said: Any, key: str, *, of_parameters: bool = False) -> dict[str, Any]:
        if said in ("__ALL_PRUNABLE__", "Linear") or said in (["__ALL_PRUNABLE__"], ["Linear"]):
            return {}
        globs = []
        for each in _listed(said):
            glob = _glob(each, "weight" if of_parameters else "")
            if glob is None:
                self.mistakes.append(f"{name}.{key}: {shown(each)} can't be said as a glob on names of linear layers")
            globs.append(glob)
        if not globs:
            self.mistakes.append(
                f"{name}.{key}: {shown(said)}; expected __ALL_PRUNABLE__, or names and expressions re:…"
            )
        return {} if "*" in globs else {"include": globs}


def _listed(said: Any) -> list[Any]:
    return list(said) if isinstance(said, list) else [] if said is None else [said]


def _glob(said: Any, ending: str = "") -> str | None:
    """The glob on module names for a name, or for an expression `re:…` of literal characters, `.*`, and `\\d+` or `\\d*`.

    An expression fits from the beginning on and need not reach the end. A lone dot in it is read as the dot that it stands for. `ending`: the
    name is that of a parameter, whose module the glob is for.
    """
    if not isinstance(said, str) or said.startswith("__"):
        return None
    if not said.startswith("re:"):
        glob = said
    else:
        expression, is_whole = said.removeprefix("re:").removeprefix("^"), said.endswith("$")
        glob = re.sub(r"\.\*|\\d[*+]", "\0", expression.removesuffix("$")).replace(r"\.", ".")
        if re.search(r"[\\()\[\]{}|?+*^$]", glob):
            return None
        glob = glob.replace("\0", "*") + ("" if is_whole or (ending and glob.endswith(ending)) else "*")
    if ending:
        if not glob.endswith(ending):
            return "*" if glob == "*" else None
        glob = glob.removesuffix(ending)
        glob = glob.removesuffix(".") if glob.endswith(".") else glob
    return re.sub(r"\*+", "*", glob)


_Reader = Callable[[_Import, str, dict[str, Any]], list[Step]]
_READERS: dict[str, tuple[_Reader, dict[str, Any]]] = {
    "GMPruningModifier": (_Import.gradual, _GRADUAL),
    "MagnitudePruningModifier": (_Import.gradual, _GRADUAL),
    "GlobalMagnitudePruningModifier": (_Import.gradual, _GRADUAL),
    "ConstantPruningModifier": (
        _Import.constant,
        dict.fromkeys(("params", "targets", "start_epoch", "end_epoch", "start", "end", "update_frequency")),
    ),
    "LayerPruningModifier": (
        _Import.layers,
        {"layers": None, "start_epoch": -1.0, "end_epoch": -1.0, "update_frequency": None},
    ),
    "SparseGPTModifier": (
        _Import.one_shot,
        {**_ONE_SHOT, "block_size": None, "dampening_frac": None, "preserve_sparsity_mask": False},
    ),
    "WandaPruningModifier": (_Import.one_shot, _ONE_SHOT),
}
