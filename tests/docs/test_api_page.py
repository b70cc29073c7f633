"""docs/api.md and the docstrings that it shows, read as the site reads them: every public name, its arguments, its errors."""

from __future__ import annotations

import builtins
import re
from functools import cache

import griffe
import pytest

import hf_prune
from hf_prune import errors
from tests.docs.pages import ROOT


PAGE = ROOT / "docs" / "api.md"
NAMES = [name for name in hf_prune.__all__ if name != "__version__"]
# what takes anything that its annotation allows
NEVER_FAILS = {"inspect_model", "PruningReport.attach_", "PruningReport.from_dict", "PruningReport.print_to"}
# extended by us as Trainer calls it, and documented there
OF_TRAINER = {
    "train",
    "evaluate",
    "log",
    "compute_loss",
    "save_model",
    "on_train_begin",
    "on_optimizer_step",
    "on_train_end",
}


@cache
def package():
    return griffe.load("hf_prune", search_paths=[str(ROOT)], resolve_aliases=True, resolve_external=False)


def definition(name):
    """Found as `hf_prune.NAME`, which its `__getattr__` looks up and static readers take from under TYPE_CHECKING."""
    found = package()[name]
    return found.final_target if found.is_alias else found


def documented():
    """(name, docstring, parameters) of each public function, method and class."""
    for name in NAMES:
        found = definition(name)
        if found.is_function:
            yield name, found, found.parameters
            continue
        yield name, found, found.parameters
        for member, method in found.members.items():
            if method.is_function and not member.startswith("_") and member not in OF_TRAINER:
                yield f"{name}.{member}", method, method.parameters


DOCUMENTED = [pytest.param(*each, id=each[0]) for each in documented()]


def parts(found):
    assert found.docstring is not None, "no docstring"
    return {part.kind.value: part.value for part in found.docstring.parse("google", warnings=False)}


def test_the_page_has_every_public_name_once():
    assert sorted(re.findall(r"^::: hf_prune\.(\w+)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)) == sorted(
        NAMES
    )


@pytest.mark.parametrize(("name", "found", "parameters"), DOCUMENTED)
def test_every_argument_is_explained(name, found, parameters):
    explained = [part.name.lstrip("*") for part in parts(found).get("parameters", [])]
    taken = [parameter.name for parameter in parameters if parameter.name not in ("self", "cls", "args", "kwargs")]
    assert explained == taken


@pytest.mark.parametrize(("name", "found", "parameters"), DOCUMENTED)
def test_what_takes_arguments_says_what_it_raises(name, found, parameters):
    raised = [str(part.annotation) for part in parts(found).get("raises", [])]
    assert all(hasattr(errors, error) or hasattr(builtins, error) for error in raised)
    takes = [parameter for parameter in parameters if parameter.name not in ("self", "cls")]
    if takes and not (found.is_class and "dataclass" in found.labels):
        assert bool(raised) is (name not in NEVER_FAILS)


def test_what_is_left_to_trainer_is_trainer_s():
    from transformers import Trainer, TrainerCallback

    assert all(hasattr(Trainer, name) or hasattr(TrainerCallback, name) for name in OF_TRAINER)
