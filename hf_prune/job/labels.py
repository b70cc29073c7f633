"""The classes of a data set, and how they go with those that a model's head was trained for."""

from __future__ import annotations

from typing import Any

from hf_prune.errors import RecipeError
from hf_prune.job.sources import require_column


_SHOWN = 8  # classes that a message lists


class Labels:
    """Classes by number: the model's own where its head knows those of the data, else the data's.

    Args:
        train, evaluation: the splits; they name their classes (ClassLabel), or hold strings or whole numbers.
        column: that holds the class.
        config: of the model.

    Raises:
        RecipeError: labels are missing or no classes, there is one class only, or the model's head has others.
    """

    def __init__(self, train: Any, evaluation: Any, column: str, config: Any):
        self.column = column
        values = [value for split in (train, evaluation) for value in _values(split, column)]
        present = sorted(set(values), key=lambda value: (isinstance(value, str), value))
        if len(present) < 2:
            raise RecipeError(
                f"data.label_column: {column!r} holds one class only ({present[0]!r}); expected two or more"
            )
        named = getattr(train.features[column], "names", None)
        if named is not None and not all(0 <= value < len(named) for value in present):
            outside = next(value for value in present if not 0 <= value < len(named))
            raise RecipeError(
                f"data.label_column: {column!r} holds {outside} outside its {len(named)} classes; a split without labels? "
                "Choose another with data.train_split or data.eval_split"
            )
        names = {value: str(named[value]) for value in range(len(named))} if named else {v: str(v) for v in present}
        self.names = self._of_head(names, config) or list(names.values())
        self._number_of = {value: self.names.index(name) for value, name in names.items()}

    def _of_head(self, names: dict[Any, str], config: Any) -> list[str] | None:
        """The classes of the model's trained head, if it has one that fits."""
        named = (getattr(config, "architectures", None) or [""])[0]
        if not named.endswith("Classification"):
            return None
        known = [str(config.id2label[number]) for number in range(config.num_labels)]
        has_no_names = known == [f"LABEL_{number}" for number in range(len(known))]
        if set(names.values()) <= set(known):
            return known
        if has_no_names and all(isinstance(value, int) and 0 <= value < len(known) for value in names):
            return [names.get(number, name) for number, name in enumerate(known)]
        if has_no_names and len(names) == len(known):
            return None
        stranger = next(name for name in names.values() if name not in known)
        raise RecipeError(
            f"data.label_column: the data have {len(names)} classes, such as {stranger!r}; the model's head has "
            f"{len(known)} ({_listed(known)}). Rename or drop the data's classes, or start from a model without a "
            "trained head"
        )

    def numbers(self, values: list[Any]) -> list[int]:
        """The class numbers of a batch of labels."""
        return [self._number_of[value] for value in values]

    def config(self) -> dict[str, Any]:
        """What a classifier's config says of its classes."""
        return {
            "num_labels": len(self.names),
            "id2label": dict(enumerate(self.names)),
            "label2id": {name: number for number, name in enumerate(self.names)},
        }


def _values(split: Any, column: str) -> list[Any]:
    require_column(split, column, "label_column")
    values = split[column][:]
    missing = sum(value is None for value in values)
    if missing:
        raise RecipeError(
            f"data.label_column: {missing} of {len(values)} samples have no {column!r}; drop or label them"
        )
    wrong = next((value for value in values if not isinstance(value, (str, int))), None)
    if wrong is not None:
        raise RecipeError(f"data.label_column: {column!r} holds {wrong!r}; expected classes, as text or whole numbers")
    return values


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
