"""Which column of a language model's evaluation data says the domain of a text."""

from datasets import ClassLabel, Dataset

from hf_prune.job.tasks import MOST_DOMAINS, _domains


def test_texts_are_grouped_by_the_column_if_it_has_few_values():
    data = Dataset.from_dict({"text": ["a", "b", "c"], "label": ["news", "code", "news"]})
    found = _domains(data, "label")
    assert {name: part["text"][:] for name, part in found.items()} == {"code": ["b"], "news": ["a", "c"]}
    named = data.map(lambda row, at: {"label": at % 2}, with_indices=True).cast_column(
        "label", ClassLabel(names=["x", "y"])
    )
    assert {name: part["text"][:] for name, part in _domains(named, "label").items()} == {"x": ["a", "c"], "y": ["b"]}


def test_a_column_that_says_something_else_is_none():
    number = list(range(MOST_DOMAINS + 1))
    data = Dataset.from_dict({"label": number, "same": [1] * len(number), "some": [None, 1] + [2] * (len(number) - 2)})
    assert not any(_domains(data, column) for column in ("label", "same", "some", "missing"))
