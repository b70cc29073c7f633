#!/usr/bin/env python
r"""Fine-tunes a text classifier while pruning it, evaluates it and saves it; it can also predict and push to the Hub.

On a Hub data set, with a recipe that is shipped (`hf-prune recipes` lists them) or one of your own:

    python scripts/run_text_classification.py \
        --model_name_or_path google-bert/bert-base-uncased \
        --dataset_name fancyzhx/ag_news --validation_split_name test \
        --recipe heads-and-neurons \
        --do_train --do_eval \
        --learning_rate 5e-5 --num_train_epochs 3 --per_device_train_batch_size 32 \
        --output_dir outputs/ag-news --push_to_hub

On files of your own (csv, json, jsonl or parquet, with the columns `text` and `label`), in two processes:

    torchrun --nproc_per_node 2 scripts/run_text_classification.py \
        --model_name_or_path google-bert/bert-base-uncased \
        --train_file train.csv --validation_file validation.csv \
        --recipe recipe.yaml --do_train --do_eval --output_dir outputs/mine

Processes without a GPU need `--use_cpu`. With all arguments in a file: `python scripts/run_text_classification.py
arguments.yaml` (or .json). An interrupted run goes on with `--resume_from_checkpoint last`. Without `--recipe` this is
plain fine-tuning: the lines that pruning adds to a script of Transformers end in `# pruning`.
"""

import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import evaluate
import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Value, load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EvalPrediction,
    HfArgumentParser,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

import hf_prune  # pruning


logger = logging.getLogger(__name__)

LOADERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


@dataclass
class ModelArguments:
    """Which model to begin from."""

    model_name_or_path: str = field(metadata={"help": "A Hub id or a local directory."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit."})
    dtype: str = field(default="float32", metadata={"help": "Of the weights; `auto` takes them as they were saved."})
    token: str | None = field(
        default=None, metadata={"help": "For the Hub; else the one that `hf auth login` stored."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Put a new head where the model's has another number of classes."}
    )


@dataclass
class DataArguments:
    """Which data to train, evaluate and predict on."""

    dataset_name: str | None = field(default=None, metadata={"help": "A Hub id or a local directory."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Which configuration of it."})
    train_file: str | None = field(default=None, metadata={"help": "csv, json, jsonl or parquet."})
    validation_file: str | None = field(default=None, metadata={"help": "As train_file."})
    test_file: str | None = field(default=None, metadata={"help": "As train_file; for --do_predict."})
    train_split_name: str = field(default="train", metadata={"help": "The split to train on."})
    validation_split_name: str = field(default="validation", metadata={"help": "The split to evaluate on."})
    test_split_name: str = field(default="test", metadata={"help": "The split to predict on."})
    validation_split_percentage: int = field(
        default=10, metadata={"help": "How much of the training data to hold out where there is no validation split."}
    )
    text_column_name: str = field(default="text", metadata={"help": "The column of the text."})
    text_pair_column_name: str | None = field(default=None, metadata={"help": "The column of a second text, if any."})
    label_column_name: str = field(default="label", metadata={"help": "The column of the class: a name or a number."})
    max_seq_length: int = field(default=128, metadata={"help": "Longer texts are cut, in tokens."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many samples only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on so many samples only."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Predict so many samples only."})
    metric_name: str = field(
        default="accuracy", metadata={"help": "A metric of `evaluate`: its name or local folder."}
    )


@dataclass
class PruningArguments:
    """How to prune."""

    recipe: str | None = field(
        default=None, metadata={"help": "A YAML file or a shipped recipe; none: plain training."}
    )


def main() -> None:
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments, PruningArguments))  # pruning
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        model_args, data_args, training_args, pruning_args = parser.parse_json_file(sys.argv[1])
    elif len(sys.argv) == 2 and sys.argv[1].endswith((".yaml", ".yml")):
        model_args, data_args, training_args, pruning_args = parser.parse_yaml_file(sys.argv[1])
    else:
        model_args, data_args, training_args, pruning_args = parser.parse_args_into_dataclasses()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    logger.setLevel(logging.INFO if training_args.should_log else logging.WARNING)

    if int(os.environ.get("WORLD_SIZE", 1)) != training_args.world_size:
        sys.exit("each of these processes would train on its own: on a machine without GPU, add --use_cpu")

    # Mistakes in the recipe show here, before anything is loaded.
    recipe = hf_prune.Recipe.load(pruning_args.recipe) if pruning_args.recipe else None  # pruning
    if recipe is not None and not training_args.do_train:
        sys.exit("--recipe prunes while it trains: add --do_train, or leave --recipe out")
    set_seed(training_args.seed)

    splits = load_splits(data_args, training_args, model_args.token)
    text_columns = [data_args.text_column_name]
    if data_args.text_pair_column_name is not None:
        text_columns.append(data_args.text_pair_column_name)
    check_columns(splits["train"], *text_columns, data_args.label_column_name)
    names, number_of = classes(splits, data_args.label_column_name)

    tokenizer = AutoTokenizer.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        token=model_args.token,
        trust_remote_code=model_args.trust_remote_code,
    )
    model = AutoModelForSequenceClassification.from_pretrained(
        model_args.model_name_or_path,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
        ignore_mismatched_sizes=model_args.ignore_mismatched_sizes,
        dtype=model_args.dtype,
        revision=model_args.model_revision,
        token=model_args.token,
        trust_remote_code=model_args.trust_remote_code,
    )

    def encode(batch: dict) -> dict:
        texts = [batch[column] for column in text_columns]
        encoded = tokenizer(*texts, truncation=True, max_length=data_args.max_seq_length)
        if data_args.label_column_name in batch:
            encoded["labels"] = [number_of[label] for label in batch[data_args.label_column_name]]
        return encoded

    limits = {
        "train": data_args.max_train_samples,
        "validation": data_args.max_eval_samples,
        "test": data_args.max_predict_samples,
    }
    with training_args.main_process_first(desc="tokenization"):
        for name, split in splits.items():
            split = split.select(range(min(limits[name] or len(split), len(split))))
            if name == "test":  # needs no labels; where they are kept secret they are -1
                split = split.select_columns(text_columns)
            splits[name] = split.map(encode, batched=True, remove_columns=split.column_names, desc=name)

    metric = load_metric(data_args.metric_name)

    def compute_metrics(p: EvalPrediction) -> dict[str, float]:
        logits = p.predictions[0] if isinstance(p.predictions, tuple) else p.predictions
        return metric(predictions=np.argmax(logits, axis=-1), references=p.label_ids)

    trainer = hf_prune.PruningTrainer(  # pruning
        model=model,
        args=training_args,
        train_dataset=splits["train"] if training_args.do_train else None,
        eval_dataset=splits["validation"],
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
        recipe=recipe,  # pruning
    )

    if training_args.do_train:
        checkpoint = training_args.resume_from_checkpoint
        if checkpoint == "last":  # none yet: a new start
            checkpoint = get_last_checkpoint(training_args.output_dir)
        metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
        trainer.save_model()
        metrics["train_samples"] = len(splits["train"])
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)
        trainer.save_state()
        if trainer.pruning_report is not None and trainer.is_world_process_zero():  # pruning
            print(trainer.pruning_report)  # pruning

    if training_args.do_eval:
        metrics = trainer.evaluate()
        metrics["eval_samples"] = len(splits["validation"])
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)

    if training_args.do_predict:
        logits = trainer.predict(splits["test"], metric_key_prefix="predict").predictions
        predicted = [names[number] for number in np.argmax(logits, axis=-1)]
        if trainer.is_world_process_zero():
            lines = ["index\tprediction", *(f"{index}\t{name}" for index, name in enumerate(predicted))]
            Path(training_args.output_dir, "predict_results.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")

    card = {"finetuned_from": model_args.model_name_or_path, "tasks": "text-classification"}
    if data_args.dataset_name is not None:
        card["dataset"] = card["dataset_tags"] = data_args.dataset_name
    if training_args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)


def load_splits(data_args: DataArguments, training_args: TrainingArguments, token: str | None) -> DatasetDict:
    """`train`, `validation` and, to predict on, `test`. The first two shuffled: their first samples are any samples."""
    wanted = ("train", "validation", "test") if training_args.do_predict else ("train", "validation")
    if data_args.dataset_name is not None:
        loaded = load_dataset(data_args.dataset_name, data_args.dataset_config_name, token=token)
        names = {name: getattr(data_args, f"{name}_split_name") for name in wanted}
        splits = DatasetDict({name: loaded[split] for name, split in names.items() if split in loaded})
        there_are = f"the data set has the splits {', '.join(loaded)}"
    else:
        files = {name: file for name in wanted if (file := getattr(data_args, f"{name}_file")) is not None}
        for name, file in files.items():
            if not Path(file).is_file() or Path(file).suffix not in LOADERS:
                sys.exit(f"--{name}_file {file}: expected an existing file that ends in {', '.join(LOADERS)}")
        splits = DatasetDict(
            {
                name: load_dataset(LOADERS[Path(file).suffix], data_files=file, split="train")
                for name, file in files.items()
            }
        )
        there_are = f"there are files for {', '.join(files) or 'no split'}, and no --dataset_name"
    for name in wanted:
        if name not in splits and name != "validation":
            sys.exit(f"no {name} data: {there_are}; choose with --{name}_split_name, or give --{name}_file")
    if "validation" not in splits:
        held_out = data_args.validation_split_percentage / 100
        parts = splits["train"].train_test_split(test_size=held_out, seed=training_args.seed)
        splits["train"], splits["validation"] = parts["train"], parts["test"]
        logger.info("held out %s training samples for validation", len(splits["validation"]))
    for name in ("train", "validation"):
        splits[name] = splits[name].shuffle(seed=training_args.seed)
    return splits


def check_columns(split: Dataset, *columns: str) -> None:
    """End the script if a column is missing, with the names of those that there are."""
    for column in columns:
        if column not in split.column_names:
            sys.exit(
                f"the data have no column {column!r}; they have {', '.join(split.column_names)}: choose with "
                "--text_column_name and --label_column_name"
            )


def classes(splits: DatasetDict, column: str) -> tuple[list[str], dict]:
    """The names of the classes, and the number of each label as it stands in the data."""
    feature = splits["train"].features[column]
    if isinstance(feature, ClassLabel):
        return feature.names, {number: number for number in range(len(feature.names))}
    if not isinstance(feature, Value) or feature.dtype.startswith("float"):
        sys.exit(f"--label_column_name {column}: expected one name or whole number a sample, found {feature}")
    found = sorted({*splits["train"].unique(column), *splits["validation"].unique(column)}, key=str)
    return [str(label) for label in found], {label: number for number, label in enumerate(found)}


def load_metric(name: str) -> Callable[..., dict[str, float]]:
    """A metric of `evaluate`; plain accuracy where that can't be had, for instance offline."""
    try:
        metric = evaluate.load(name).compute
        logger.info("metric: %s of `evaluate`", name)
    except (ImportError, OSError) as error:
        if name != "accuracy":
            sys.exit(f"--metric_name {name} can't be loaded: {error}")
        logger.info("metric: accuracy, computed here, as `evaluate` can't load its own: %s", error)

        def metric(predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
            return {"accuracy": float((np.asarray(predictions) == np.asarray(references)).mean())}

    return metric


if __name__ == "__main__":
    try:
        main()
    except hf_prune.PruneError as error:  # pruning
        sys.exit(f"{type(error).__name__}: {error}")
