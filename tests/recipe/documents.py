"""Recipes by the hundred: a grid of good ones, and everything that is one change away from one of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from hf_prune.recipe.shipped import shipped_recipes
from hf_prune.recipe.vocabulary import CRITERIA
from hf_prune.recipe.yaml import read_yaml


UNIT_TARGETS = ("ffn_neurons", "attention_heads", "layers", "experts")
AMOUNTS: dict[str, list[Any]] = {
    "sparsity": [0, 0.5, {"parameters": 0.2}, {"macs": 0.2}],
    "threshold": [
        {"rule": "absolute", "value": 0.01},
        {"rule": "relative_to_max", "value": 0.1},
        {"rule": "mean_minus_std", "value": 2},
    ],
    "remove": [[0, 2], {"*.0.*": [1], "*.1.*": [0, 3.0]}],
}
# every key of a step with values that are good somewhere; crossed with every good step
OPTIONS: dict[str, list[Any]] = {
    **AMOUNTS,
    "part": ["block", "attention", "feed_forward"],
    "criterion": [
        *CRITERIA,
        {"name": "random", "seed": 3},
        {"name": "combined", "of": {"activation": 0.7, "taylor": {"weight": 1}}},
        {"name": "combined", "of": {"l1": 2, "random": {"weight": 0.1, "seed": 3}}},
        {"name": "loss_change", "greedy": True},
        {"name": "loss_change", "greedy": False, "samples": 4},
        {"name": "ria", "power": 1},
        {"name": "sparsegpt", "block": 64, "damping": 0.05, "refine": 0, "dense_target": True},
    ],
    "scope": ["output", "layer", "global"],
    "normalize": ["auto", "none", "mean", "max"],
    "uniform": [True, False],
    "round_to": [1, 8, 8.0],
    "min_keep": [1, 4],
    "allocation": [
        "owl",
        "kind",
        {"name": "owl", "multiple": 7, "spread": 0.05},
        {"name": "sensitivity", "file": "x.json"},
        {"*.0.*": 0, "*.1.*": 0.3},
    ],
    "min_sparsity": [0, 0.1, {"*.0.*": 0.1}],
    "max_sparsity": [1, 0.9, {"*.0.*": 1, "*.1.*": 0.4}],
    "include": [["*.0.*"]],
    "exclude": [["*.0.*", "*.1.*"]],
    "pattern": ["unstructured", "2:4", "1:2", "4:8", {"block": [4, 4]}],
    "compensation": [
        "none",
        "bias",
        "least_squares",
        "linear",
        {"name": "none"},
        {"name": "bias", "add": True},
        {"name": "least_squares", "add": False},
        {"name": "reconstruct", "epochs": 4, "learning_rate": 1},
        {"name": "reconstruct", "add": True, "learning_rate": 1e-3},
    ],
    "schedule": [{"name": "linear"}, {"begin": 0, "end": 1, "updates": 3}, {"shrink": "never"}, {"rewind": 0}],
}
SECTIONS: dict[str, list[Any]] = {
    "name": ["half", "on", "1e-3", "010", "09", "null", "", "ünïcode: # not a comment"],
    "description": ["text\nin lines"],
    "seed": [0, 7, 2**32 - 1],
    "model": [{"name_or_path": "a/b", "task": "text-generation", "revision": "main", "dtype": "bfloat16"}],
    "data": [
        {"name_or_path": "a/b"},
        {"name_or_path": "x.csv", "eval_split": "test", "max_length": 8, "max_train_samples": 9, "test_size": 0.5},
    ],
    "output": [{"dir": "x"}, {"push_to_hub": True, "repo_id": "me/it", "private": False}],
    "training": [
        {},
        {"learning_rate": 1e-3, "num_train_epochs": 2, "save_strategy": "steps", "report_to": None, "label_names": []},
        {"lr_scheduler_type": "linear", "bf16": False, "resume_from_checkpoint": True, "lr_scheduler_kwargs": {}},
    ],
    "schedule": [
        {"name": "one_shot", "begin": 0.5, "rewind": 0.25},
        {"name": "constant", "begin": 0.2, "end": 0.4, "updates": 2, "shrink": "never"},
    ],
    "distillation": [
        {},
        {"temperature": 4, "weight": 0.9, "hidden_states": 0},
        {"weight": 0, "hidden_states": 0.1},
    ],
    "calibration": [{"samples": 8, "length": 16, "batch_size": 2, "offload": "disk"}],
}
# what is put in the place of each value of a good recipe
JUNK = [None, True, "x", "2:4", "4:2", -1, 0, 0.5, 1, 1.5, 2, 10**12, [], [1], ["x"], [1, 2], {}, {"x": 1}, {"*": [1]}]


def recipe(step: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    return {"version": 1, "prune": [step or {"target": "ffn_neurons", "sparsity": 0.5}], **changes}


def good() -> Iterator[dict[str, Any]]:
    """Recipes that must be accepted."""
    for target in UNIT_TARGETS:
        for amount, values in AMOUNTS.items():
            for value in values:
                if isinstance(value, list) and target != "layers":
                    continue
                yield recipe({"target": target, amount: value})
                yield recipe({"target": target, amount: value, "scope": "global", "criterion": "activation"})
        yield recipe({"target": target, "sparsity": 0.5, "criterion": {"name": "random", "seed": 3}, "min_keep": 2})
    for amount in (0.3, {"macs": 0.1}):
        yield recipe({"target": "attention_heads", "sparsity": amount, "uniform": True, "round_to": 2})
    for target in ("weights", *UNIT_TARGETS):
        yield recipe({"target": target, "sparsity": 0.5, "allocation": "kind", "scope": "global"})
        yield recipe({"target": target, "sparsity": 0.5, "allocation": {"name": "sensitivity", "file": "x.json"}})
        yield recipe({"target": target, "sparsity": 0.5, "allocation": {"*.0.*": 0.2}, "max_sparsity": {"*": 0.9}})
    for criterion in ("l1", "wanda", "sparsegpt"):
        yield recipe({"target": "weights", "sparsity": 0.5, "criterion": criterion, "allocation": "owl"})
    for criterion in ("fisher", "fluctuation", "apoz"):
        yield recipe({"target": "ffn_neurons", "sparsity": 0.5, "criterion": criterion, "compensation": "bias"})
    yield recipe({"target": "attention_heads", "sparsity": 0.5, "compensation": "least_squares"})
    yield recipe({"target": "ffn_neurons", "sparsity": 0.5, "compensation": {"name": "bias", "add": True}})
    yield recipe({"target": "layers", "sparsity": 0.2, "criterion": "loss_change"})
    for criterion in ("block_influence", {"name": "loss_change", "greedy": False, "samples": 4}):
        yield recipe({"target": "layers", "sparsity": 0.2, "criterion": criterion, "compensation": "linear"})
    yield recipe({"target": "layers", "sparsity": 0.2, "criterion": "angular"})
    yield recipe({"target": "attention_heads", "sparsity": 0.2, "criterion": "loss_change", "scope": "global"})
    for target, of in (("layers", "fisher"), ("attention_heads", "activation"), ("weights", "wanda")):
        criterion = {"name": "combined", "of": {of: 0.5, "random": {"weight": 1, "seed": 2}}}
        yield recipe({"target": target, "sparsity": 0.2, "criterion": criterion, "scope": "global"})
    for pattern in OPTIONS["pattern"]:
        is_n_m = isinstance(pattern, str) and ":" in pattern
        amount = {} if is_n_m else {"sparsity": 0.5}
        yield recipe({"target": "weights", "pattern": pattern, "criterion": "taylor", "scope": "output", **amount})
    yield recipe({"target": "weights", "threshold": AMOUNTS["threshold"][0], "exclude": ["*.0.*"]})
    for criterion in ("wanda", {"name": "ria", "power": 0.25}, "sparsegpt", {"name": "sparsegpt", "damping": 0.05}):
        yield recipe({"target": "weights", "sparsity": 0.5, "criterion": criterion})
        yield recipe({"target": "weights", "pattern": "2:4", "criterion": criterion, "scope": "layer"})
    for target in ("weights", "ffn_neurons"):
        yield recipe({"target": target, "sparsity": 0.5, "criterion": "movement"})
        yield recipe({"target": target, "threshold": AMOUNTS["threshold"][0], "criterion": "soft_movement"})
    for name, values in SECTIONS.items():
        for value in values:
            yield recipe(**{name: value})
    for path in shipped_recipes().values():
        yield read_yaml(path).content


def crossed() -> Iterator[dict[str, Any]]:
    """Good recipes with each key of a step set to each of its values: good or bad, by the rules between keys."""
    seen: set[str] = set()
    for document in good():
        for key, values in OPTIONS.items():
            for value in values:
                changed = copy.deepcopy(document)
                changed["prune"][0][key] = value
                yield from _once(seen, changed, "prune")


def mutated() -> Iterator[dict[str, Any]]:
    """Good recipes with one value replaced, one key dropped, or one unknown key added, at every place.

    No rule goes between sections, so that the same change to the same section comes once.
    """
    seen: set[str] = set()
    for document in good():
        for path in _paths(document):
            at, last = _parent(document, path)
            for junk in JUNK:
                yield from _once(seen, _changed(document, path, junk), path[0])
            if isinstance(at, dict):
                yield from _once(seen, _without(document, path), path[0])
                unknown = (*path[:-1], f"{last}x")
                yield from _once(seen, _changed(document, unknown, 1), unknown[0])


def _once(seen: set[str], document: dict[str, Any], section: str) -> Iterator[dict[str, Any]]:
    text = f"{section}: {document[section]!r}" if section in document else f"no {section}"
    if text not in seen:
        seen.add(text)
        yield document


def _paths(value: Any, path: tuple = ()) -> Iterator[tuple]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in pairs:
        yield (*path, key)
        yield from _paths(item, (*path, key))


def _parent(document: Any, path: tuple) -> tuple[Any, Any]:
    for part in path[:-1]:
        document = document[part]
    return document, path[-1]


def _changed(document: Any, path: tuple, value: Any) -> Any:
    document = copy.deepcopy(document)
    at, last = _parent(document, path)
    at[last] = value
    return document


def _without(document: Any, path: tuple) -> Any:
    document = copy.deepcopy(document)
    at, last = _parent(document, path)
    del at[last]
    return document
