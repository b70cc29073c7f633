"""The classes of a data set against those of a model's head."""

import pytest
from datasets import ClassLabel, Dataset, Features
from transformers import BertConfig

from hf_prune.errors import RecipeError
from hf_prune.job.labels import Labels


def data(*labels, names=None):
    features = Features({"label": ClassLabel(names=names)}) if names else None
    return Dataset.from_dict({"label": list(labels)}, features=features)


def config(*names, trained=True):
    labels = dict(enumerate(names)) or {0: "LABEL_0", 1: "LABEL_1"}
    kind = "BertForSequenceClassification" if trained else "BertModel"
    return BertConfig(id2label=labels, label2id={n: i for i, n in labels.items()}, architectures=[kind])


@pytest.mark.parametrize(
    ("values", "of_model", "names", "numbers"),
    [
        (data("b", "a"), config(trained=False), ["a", "b"], [1, 0]),
        (data(10, 9, 2), config(trained=False), ["2", "9", "10"], [2, 1, 0]),  # by number, not by letter
        (data(1, 0, names=["x", "y"]), config(trained=False), ["x", "y"], [1, 0]),
        (data("a", "b"), config("b", "a"), ["b", "a"], [1, 0]),  # the head's order
        (data("a", "c"), config("a", "b", "c"), ["a", "b", "c"], [0, 2]),  # and its classes that aren't in the data
        (data(0, 1, names=["a", "b"]), config("b", "a"), ["b", "a"], [1, 0]),
        (data("a", "b"), config(), ["a", "b"], [0, 1]),  # a head without names of its own
        (data(0, 2), config("LABEL_0", "LABEL_1", "LABEL_2"), ["0", "LABEL_1", "2"], [0, 2]),
    ],
)
def test_numbers_and_names(values, of_model, names, numbers):
    labels = Labels(values, values, "label", of_model)
    assert labels.numbers(values["label"][:]) == numbers
    assert labels.config()["id2label"] == dict(enumerate(names))
    assert labels.config()["num_labels"] == len(names)


@pytest.mark.parametrize(
    ("values", "of_model", "message"),
    [
        (data("a", "a"), config(), "one class only"),
        (data("a", None), config(), "1 of 2 samples have no 'label'"),
        (data(0.5, 1.0), config(), "expected classes, as text or whole numbers"),
        (data([1], [2]), config(), "expected classes"),
        (data(0, -1, names=["a", "b"]), config(), "holds -1 outside its 2 classes; a split without labels"),
        (data("x", "y"), config("a", "b"), "the data have 2 classes, such as 'x'; the model's head has 2"),
        (data("x", "y", "z"), config(), "the data have 3 classes"),
    ],
)
def test_refused(values, of_model, message):
    with pytest.raises(RecipeError, match=message):
        Labels(values, values, "label", of_model)


def test_a_missing_column_lists_those_that_are_there():
    with pytest.raises(RecipeError, match="no column 'kind'; they have label"):
        Labels(data("a"), data("a"), "kind", config())
