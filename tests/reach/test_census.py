"""The reviewed census says what watching a run says, but for what it gives a written reason."""

from zlib import crc32

import pytest

from tests.reach.census import KINDS, census, seen, without_reasoned
from tests.reach.zoo import REASONS, build, model_types
from tests.zoo import is_before


TYPES = sorted(census()["types"])
SAMPLE = [name for name in TYPES if crc32(name.encode()) % 100 == 0]


@pytest.mark.skipif(is_before("5.23"), reason="the census is of Transformers 5.23")
def test_the_file_is_of_types_that_there_are_and_every_reason_is_written_and_used():
    assert set(TYPES) <= set(model_types())
    for entry in census()["types"].values():
        assert entry.keys() == set(KINDS)
    for rule in census()["reasons"]:
        assert rule["kind"] in KINDS
        assert len(rule["reason"].split()) > 5
        assert set(rule.get("types", [])) <= set(TYPES)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(set(model_types()) - set(REASONS) - set(TYPES)))
def test_a_type_that_is_not_in_the_file_cannot_be_built(model_type):
    with pytest.raises(Exception):  # noqa: B017 - the zoo's tests ask for the reason
        build(model_type)


def test_a_reason_takes_out_the_names_that_it_is_about_and_no_others():
    entry = {"feed_forward": ["layers.*.mixer", "layers.*.mlp", ""], "attention": ["mixer"], "layers": []}
    assert without_reasoned("mamba", entry)["feed_forward"] == ["layers.*.mlp"]
    assert without_reasoned("bert", entry)["feed_forward"] == ["layers.*.mixer", "layers.*.mlp"]
    assert without_reasoned("mamba", entry)["attention"] == ["mixer"]


@pytest.mark.parametrize(
    "model_type", [name if name in SAMPLE else pytest.param(name, marks=pytest.mark.slow) for name in TYPES]
)
def test_a_watched_run_finds_what_the_file_says(model_type):
    assert without_reasoned(model_type, seen(build(model_type))) == census()["types"][model_type]
