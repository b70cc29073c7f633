"""Damaged and hostile manifests and recipes: each is taken as it stands or refused by the documented error, nothing else."""

import copy
import json
import tracemalloc

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import BertForSequenceClassification

from hf_prune.checkpoint.format import sizes
from hf_prune.checkpoint.modeling_hf_prune import ManifestError, resize_
from hf_prune.errors import CheckpointError, RecipeError
from hf_prune.recipe import Recipe
from hf_prune.recipe.shipped import shipped_recipes
from tests import zoo
from tests.checkpoint.shrunk import shrunk


EXAMPLES = pytest.mark.parametrize("n", [150, pytest.param(10_000, marks=pytest.mark.slow)])
MEMORY = 16 << 20  # bytes: a manifest of this model takes some kilobytes, and nothing may be allocated by its numbers

leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 100),
    st.sampled_from([-1, 0, 1, 2**31, 2**63, -(2**63), 10**18, 10**400]),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        ["zeros", "hidden_states", "../../etc/passwd", "__class__", "weight", "bias", "forward", "0", "x" * 5000]
    ),
)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def places(document, path=()):
    """Every path into nested mappings and lists."""
    yield path
    entries = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in entries:
        yield from places(value, (*path, key))


@st.composite
def damaged(draw, document):
    """The document with one to three places replaced, taken out, renamed, or given company."""
    document = {"root": copy.deepcopy(document)}
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from([path for path in places(document) if path]))
        holder = document
        for key in path[:-1]:
            holder = holder[key]
        what = draw(st.sampled_from(["replace", "remove", "add"]))
        if what == "replace" or path == ("root",):
            holder[path[-1]] = draw(values)
        elif what == "remove":
            del holder[path[-1]]
        elif isinstance(holder, dict):
            name = draw(
                st.text(max_size=8) | st.sampled_from(["absent", "tensors", "config", "version", "weight", "code"])
            )
            holder[name] = draw(values)
        else:
            holder.append(draw(values))
    return document["root"]


def entries(module, fields):
    """Entries that a module might have: names that are there, with numbers that may fit."""
    tensors = {**module._parameters, **module._buffers}
    numbers = [name for name, value in module.__dict__.items() if type(value) in (int, float)]
    shapes = {
        name: st.tuples(*(st.integers(1, max(size, 1)) for size in tensor.shape)).map(list)
        for name, tensor in tensors.items()
        if tensor is not None
    }
    parts = {
        "tensors": st.fixed_dictionaries(shapes)
        | st.dictionaries(st.sampled_from([*tensors, "x"]), values, max_size=2),
        "attributes": st.dictionaries(st.sampled_from([*numbers, "x"]), st.integers(-1, 70) | leaves, max_size=2),
        "config": st.dictionaries(st.sampled_from(fields), st.integers(-1, 70) | leaves, max_size=2),
    }
    absent = st.sampled_from(["zeros", "hidden_states", ["zeros", None], ["zeros"]])
    return st.fixed_dictionaries({}, optional=parts) | st.fixed_dictionaries({"absent": absent})


def hypothesis_(n):
    return settings(
        max_examples=n, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )


@EXAMPLES
def test_a_damaged_manifest_is_refused_before_anything_changes(n):
    small, _ = shrunk("bert", targets=("ffn_neurons", "attention_heads", "layers.attention"))
    manifest = json.loads(json.dumps(small.config.hf_prune))
    with torch.device("meta"):
        whole = BertForSequenceClassification(_plain(small.config))
    stock = sizes(whole)
    outcomes = {"taken": 0, "refused": 0}

    @hypothesis_(n)
    @given(damaged(manifest))
    def one(manifest):
        model = copy.deepcopy(whole)
        tracemalloc.start()
        try:
            resize_(model, manifest)
        except ManifestError as error:
            outcomes["refused"] += 1
            assert len(str(error)) < 2000
            assert sizes(model) == stock
        else:
            outcomes["taken"] += 1
            left = sum(parameter.numel() for parameter in model.parameters())
            assert left <= sum(parameter.numel() for parameter in whole.parameters()) + 1000  # new biases
            assert all(parameter.is_meta for parameter in model.parameters())
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < MEMORY

    one()
    assert all(outcomes.values()), f"{outcomes}: one outcome was never tried"


def _plain(config):
    plain = copy.deepcopy(config)
    del plain.hf_prune
    return plain


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5"])
@EXAMPLES
def test_a_made_up_manifest_in_a_config_is_a_checkpoint_error(n, name):
    """Through Transformers' own construction, as `from_pretrained` goes: modules that are there, with entries of any kind."""
    stock = zoo.build_on_meta(name)
    modules, fields = dict(stock.named_modules()), [each for each in dir(stock.config) if not each.startswith("__")]
    prefix = stock.base_model_prefix if stock.base_model is not stock else ""
    outcomes = {"taken": 0, "refused": 0}

    def one_entry(module):
        return st.tuples(st.just(module), entries(modules[module], fields))

    @hypothesis_(n // 5)
    @given(st.lists(st.sampled_from([*modules]).flatmap(one_entry), min_size=1, max_size=2))
    def one(entries):
        config = copy.deepcopy(stock.config)
        whole = {"version": 1, "class": type(stock).__name__, "base_model_prefix": prefix, "modules": dict(entries)}
        config.hf_prune = whole
        with torch.device("meta"):
            try:
                zoo.MODELS[name][2].from_config(config)
            except CheckpointError as error:
                outcomes["refused"] += 1
                assert str(error)
            else:
                outcomes["taken"] += 1

    one()
    assert all(outcomes.values()), f"{outcomes}: one outcome was never tried"


@EXAMPLES
def test_a_damaged_recipe_is_a_recipe_error(n):
    recipes = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in shipped_recipes().values()]
    outcomes = {"taken": 0, "refused": 0}

    @hypothesis_(n)
    @given(st.sampled_from(recipes).flatmap(damaged))
    def one(document):
        try:
            recipe = Recipe.from_dict(document)
        except RecipeError as error:
            outcomes["refused"] += 1
            assert str(error)
        else:
            outcomes["taken"] += 1
            assert Recipe.from_dict(recipe.to_dict()) == recipe

    one()
    assert all(outcomes.values()), f"{outcomes}: one outcome was never tried"


@EXAMPLES
def test_a_damaged_file_is_a_recipe_error(n, tmp_path):
    texts = [path.read_bytes() for path in shipped_recipes().values()]
    path = tmp_path / "recipe.yaml"

    @hypothesis_(n)
    @given(st.data())
    def one(data):
        text = bytearray(data.draw(st.sampled_from(texts)))
        for _ in range(data.draw(st.integers(1, 6))):
            start = data.draw(st.integers(0, len(text)))
            gone = data.draw(st.integers(0, 12))
            text[start : start + gone] = data.draw(
                st.binary(max_size=6)
                | st.sampled_from([b"&a [*a]", b"!!python/object:os.system", b"<<: *x", b"{", b"\t", b"- " * 40])
            )
        path.write_bytes(bytes(text))
        try:
            Recipe.from_yaml(path)
        except RecipeError as error:
            assert str(error)

    one()
