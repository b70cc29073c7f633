"""YAML as people mean it, and files that are no recipe."""

import math

import pytest

from hf_prune.errors import RecipeError
from hf_prune.recipe import Recipe
from hf_prune.recipe.yaml import DEEPEST, LARGEST, parse_yaml, read_yaml, write_yaml


STEPS = "prune: [{target: weights, sparsity: 0.5}]\n"


def write(tmp_path, content):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E5", 1e5),
        (".5", 0.5),
        ("5.", 5.0),
        ("-3", -3),
        ("010", 10),
        ("1_000", "1_000"),
        ("0x10", "0x10"),
        ("0o10", "0o10"),
        ("on", "on"),
        ("yes", "yes"),
        ("no", "no"),
        ("True", True),
        ("false", False),
        ("~", None),
        ("", None),
        ("2:4", "2:4"),
        ("12:30:45", "12:30:45"),
        ("2024-01-01", "2024-01-01"),
        (".inf", math.inf),
        ("-.Inf", -math.inf),
        ("'1e-3'", "1e-3"),
        ("!!str 5", "5"),
        ("!!float 5", 5.0),
    ],
)
def test_scalars(text, value):
    found = parse_yaml(f"a: {text}", "x").content["a"]
    assert found == value and type(found) is type(value)
    again = parse_yaml(write_yaml({"a": found}), "x").content["a"]
    assert again == value and type(again) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        "1e-3",
        "010",
        "09",
        "0o10",
        "on",
        "null",
        "~",
        "",
        "2:4",
        ".nan",
        "1_0",
        "!x",
        "=",
        "<<",
        "a: b",
        "\ufeffx",
        "x\u2028y",
        "\x07",
    ],
)
def test_text_is_text_again(text):
    assert parse_yaml(write_yaml({"a": [text], text: 1}), "x").content == {"a": [text], text: 1}


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbfversion: 1\n" + STEPS.encode(),
        ("version: 1\n" + STEPS).replace("\n", "\r\n"),
        "# a comment\n---\nversion: 1\n" + STEPS,
        "version: 1\nprune:\n- &first {target: weights, sparsity: 0.5}\n",
        "version: 01.0\n" + STEPS,
    ],
    ids=["byte order mark", "CRLF", "document start", "an anchor", "version 1.0"],
)
def test_unusual_and_good(content, tmp_path):
    assert Recipe.from_yaml(write(tmp_path, content)) == Recipe.from_dict(
        {"version": 1, "prune": [{"target": "weights", "sparsity": 0.5}]}
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "1:1: the recipe is empty; expected keys, beginning with version: 1"),
        ("# nothing\n", "the recipe is empty"),
        ("- 1", "the recipe is a list"),
        ("just words", "the recipe is a str"),
        (
            "version: 1\nversion: 1\n" + STEPS,
            "recipe.yaml:2:1: version: the key is there twice, first at 1:1; keep one",
        ),
        ("version: 1\na: &x [1]\nb: *x", r"recipe.yaml:3:1: b: aliases \(\*name\) are not allowed"),
        ("version: 1\na: &x [*x]", "aliases"),
        ("version: 1\na: !!python/object:os.system {}", "recipe.yaml:2:1: a: the YAML tag .* is plain data"),
        ("version: 1\nseed: !!int x", "recipe.yaml:2:1: seed: 'x' is no int"),
        ("version: 1\nseed: " + "9" * 5000, "seed: '9+' is no int"),
        ("version: 1\nseed: !!bool maybe", "'maybe' is no bool"),
        ("version: 1\n? [a, b]\n: 1", "recipe.yaml:2:3: a key is a word, not a sequence"),
        ("a: [1", r"recipe.yaml:1:6: not valid YAML: while parsing a flow sequence expected ',' or '\]'"),
        ("version: 1\n\tseed: 1", "recipe.yaml:2:1: not valid YAML: .*'.t' that cannot start any token"),
        ("a: 1\n---\nb: 2", "recipe.yaml:3: holds 2 YAML documents"),
        ("version: 1\na: " + "[" * 40 + "]" * 40, f"nested more than {DEEPEST} deep"),
        ("[" * 100_000, f"nested more than {DEEPEST} deep"),
        ("version: 1\nname: a\x00b", "recipe.yaml:2: the character .* is not allowed"),
        (b"\x89PNG\r\n\x1a\n\x00", "no text in UTF-8"),
        ("version: 1".encode("utf-16"), "no text in UTF-8"),
        ("#" * (LARGEST + 1), "more than 1,048,576 bytes"),
    ],
    ids=range(21),
)
def test_files_that_are_no_recipe(content, message, tmp_path):
    with pytest.raises(RecipeError, match=message) as caught:
        Recipe.from_yaml(write(tmp_path, content))
    assert len(str(caught.value)) < 2000


def test_a_directory_and_a_missing_file(tmp_path):
    for path, why in ((tmp_path, "Is a directory"), (tmp_path / "nowhere.yaml", "No such file"), ("a\0b", "null")):
        with pytest.raises(RecipeError, match=f"can't read the recipe .*{why}.*hf-prune recipes"):
            read_yaml(path)


def test_all_that_is_wrong_in_the_yaml_comes_with_all_else(tmp_path):
    path = write(tmp_path, "version: 1\nseed: 1\nseed: 2\nseed: 3\nname: !!x a\nprune: [{target: weight}]\n")
    with pytest.raises(RecipeError) as caught:
        Recipe.from_yaml(path)
    text = str(caught.value)
    for part in (":3:1: seed: the key is there twice", ":4:1: seed: the key", ":5:1: name: the YAML tag", "'weight'"):
        assert part in text
