"""The JSON Schema accepts what `Recipe.from_dict` does, and a recipe survives being written and read."""

import json
from collections import Counter
from pathlib import Path

import jsonschema_rs
import pytest

import hf_prune.recipe
from hf_prune.errors import RecipeError
from hf_prune.recipe import Recipe
from hf_prune.recipe.shipped import shipped_recipes
from tests.recipe.documents import crossed, good, mutated


GOOD = list(good())


def steps(document):
    found = document.get("prune")
    return [step for step in found if isinstance(step, dict)] if isinstance(found, list) else []


def is_n_m_upside_down(document):
    patterns = (step.get("pattern") for step in steps(document))
    numbers = [pattern.split(":") for pattern in patterns if isinstance(pattern, str) and ":" in pattern]
    return any(int(n) >= int(m) for n, m in numbers)


def begins_after_it_ends(document):
    schedules = [document.get("schedule"), *(step.get("schedule") for step in steps(document))]
    return any(s.get("begin", 0.1) > s.get("end", 0.6) for s in schedules if isinstance(s, dict))


def rewinds_to_after_its_begin(document):
    schedules = [document.get("schedule"), *(step.get("schedule") for step in steps(document))]
    return any((s.get("rewind") or 0) > s.get("begin", 0.1) for s in schedules if isinstance(s, dict))


# The whole list of what JSON Schema can't say: it has no way to compare two numbers, and doesn't know which version of
# Transformers is installed.
UNSAID = {
    "N:M with N not below M": is_n_m_upside_down,
    "a schedule that begins after it ends": begins_after_it_ends,
    "a rewind to after the schedule begins": rewinds_to_after_its_begin,
    "fields of TrainingArguments": lambda document: bool(document.get("training")),
}


@pytest.fixture(scope="module")
def validator():
    schema = Recipe.json_schema()
    jsonschema_rs.meta.validate(schema)
    return jsonschema_rs.Draft202012Validator(schema)


def refusal(document):
    try:
        Recipe.from_dict(document)
    except RecipeError as error:
        return str(error)
    return None


@pytest.mark.parametrize("document", GOOD, ids=range(len(GOOD)))
def test_a_good_recipe_is_accepted_and_survives_being_written(document, validator, tmp_path):
    assert validator.is_valid(document)
    first = Recipe.from_dict(document)
    assert Recipe.from_dict(first.to_dict()) == first
    assert validator.is_valid(json.loads(json.dumps(first.to_dict())))
    first.to_yaml(tmp_path / "recipe.yaml")
    assert Recipe.from_yaml(tmp_path / "recipe.yaml") == first
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_the_schema_agrees_on_every_recipe_one_change_away_from_a_good_one(validator):
    seen, unsaid = Counter(), Counter()
    for document in (*mutated(), *crossed()):
        said, is_valid = refusal(document), validator.is_valid(document)
        seen[is_valid, said is None] += 1
        if is_valid and said is not None:
            reasons = [reason for reason, holds in UNSAID.items() if holds(document)]
            assert reasons, f"the schema accepts and hf_prune doesn't: {document}\n{said}"
            unsaid.update(reasons)
        assert is_valid or said is not None, f"hf_prune accepts and the schema doesn't: {document}"
    assert unsaid.keys() == UNSAID.keys(), "a reason that nothing needs"
    assert seen[True, True] > 500 and seen[False, False] > 2000


def test_the_shipped_schema_is_that_of_the_code():
    path = Path(hf_prune.recipe.__file__).with_name("recipe.schema.json")
    assert json.loads(path.read_text(encoding="utf-8")) == Recipe.json_schema(), (
        f"write it anew: hf-prune validate --schema > {path.name}"
    )


def test_every_shipped_recipe_is_checked_here():
    assert shipped_recipes()
    assert {Recipe.from_yaml(path).name for path in shipped_recipes().values()} == set(shipped_recipes())
