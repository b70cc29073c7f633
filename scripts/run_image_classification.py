#!/usr/bin/env python
r"""Fine-tunes an image classifier while pruning it, evaluates it, saves it and can push it to the Hub.

On a Hub data set, with a recipe that is shipped (`hf-prune recipes` lists them) or one of your own:

    python scripts/run_image_classification.py \
        --model_name_or_path google/vit-base-patch16-224-in21k \
        --dataset_name AI-Lab-Makerere/beans --label_column_name labels \
        --recipe heads-and-neurons \
        --do_train --do_eval \
        --learning_rate 5e-5 --num_train_epochs 5 --per_device_train_batch_size 16 \
        --output_dir outputs/beans --push_to_hub

On folders of your own (one folder of images a class), in two processes:

    torchrun --nproc_per_node 2 scripts/run_image_classification.py \
        --model_name_or_path google/vit-base-patch16-224-in21k \
        --train_dir images/train --validation_dir images/validation \
        --recipe recipe.yaml --do_train --do_eval --output_dir outputs/mine

Processes without a GPU need `--use_cpu`. With all arguments in a file: `python scripts/run_image_classification.py
arguments.yaml` (or .json). An interrupted run goes on with `--resume_from_checkpoint last`. Without `--recipe` this is
plain fine-tuning: the lines that pruning adds to a script of Transformers end in `# pruning`. Images are read with
Pillow.
"""

import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import evaluate
import numpy as np
from datasets import ClassLabel, DatasetDict, load_dataset
from transformers import (
    AutoModelForImageClassification,
    EvalPrediction,
    HfArgumentParser,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

# not from the top: older Transformers hide it there without torchvision, which it doesn't need
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.trainer_utils import get_last_checkpoint

import hf_prune  # pruning


logger = logging.getLogger(__name__)


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
    """Which images to train and evaluate on."""

    dataset_name: str | None = field(default=None, metadata={"help": "A Hub id or a local directory."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Which configuration of it."})
    train_dir: str | None = field(default=None, metadata={"help": "A folder with one folder of images a class."})
    validation_dir: str | None = field(default=None, metadata={"help": "As train_dir."})
    train_split_name: str = field(default="train", metadata={"help": "The split to train on."})
    validation_split_name: str = field(default="validation", metadata={"help": "The split to evaluate on."})
    validation_split_percentage: int = field(
        default=10, metadata={"help": "How much of the training data to hold out where there is no validation split."}
    )
    image_column_name: str = field(default="image", metadata={"help": "The column of the image."})
    label_column_name: str = field(default="label", metadata={"help": "The column of the class."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many samples only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on so many samples only."})
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
    image_column, label_column = data_args.image_column_name, data_args.label_column_name
    names = splits["train"].features[label_column].names

    processor = AutoImageProcessor.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        token=model_args.token,
        trust_remote_code=model_args.trust_remote_code,
    )
    model = AutoModelForImageClassification.from_pretrained(
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

    def prepare(batch: dict) -> dict:
        # the place for augmentation of training images, if you want any
        images = [image.convert("RGB") for image in batch[image_column]]
        return {**processor(images, return_tensors="pt"), "labels": batch[label_column]}

    limits = {"train": data_args.max_train_samples, "validation": data_args.max_eval_samples}
    for name, split in splits.items():
        split = split.shuffle(seed=training_args.seed)
        split = split.select(range(min(limits[name] or len(split), len(split))))
        splits[name] = split.with_transform(prepare)  # as samples are read: prepared images would fill the disk
    training_args.remove_unused_columns = False  # the transform needs the image, which no model takes

    metric = load_metric(data_args.metric_name)

    def compute_metrics(p: EvalPrediction) -> dict[str, float]:
        logits = p.predictions[0] if isinstance(p.predictions, tuple) else p.predictions
        return metric(predictions=np.argmax(logits, axis=-1), references=p.label_ids)

    trainer = hf_prune.PruningTrainer(  # pruning
        model=model,
        args=training_args,
        train_dataset=splits["train"] if training_args.do_train else None,
        eval_dataset=splits["validation"],
        processing_class=processor,
        data_collator=default_data_collator,
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

    card = {"finetuned_from": model_args.model_name_or_path, "tasks": "image-classification"}
    if data_args.dataset_name is not None:
        card["dataset"] = card["dataset_tags"] = data_args.dataset_name
    if training_args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)


def load_splits(data_args: DataArguments, training_args: TrainingArguments, token: str | None) -> DatasetDict:
    """`train` and `validation`, with numbered classes; the second held out of the first where there is none."""
    names = {"train": data_args.train_split_name, "validation": data_args.validation_split_name}
    if data_args.dataset_name is not None:
        loaded = load_dataset(data_args.dataset_name, data_args.dataset_config_name, token=token)
        if names["train"] not in loaded:
            sys.exit(f"--train_split_name {names['train']}: the data set has {', '.join(loaded)}")
        splits = DatasetDict({name: loaded[split] for name, split in names.items() if split in loaded})
    else:
        folders = {"train": data_args.train_dir, "validation": data_args.validation_dir}
        folders = {name: folder for name, folder in folders.items() if folder is not None}
        if "train" not in folders:
            sys.exit("there are no data: give --dataset_name or --train_dir")
        for name, folder in folders.items():
            if not Path(folder).is_dir():
                sys.exit(f"--{name}_dir {folder}: expected a directory with one folder of images a class")
        # in one call, so that both splits number the classes alike
        splits = load_dataset("imagefolder", data_files={name: f"{path}/**" for name, path in folders.items()})
    for column in (data_args.image_column_name, data_args.label_column_name):
        if column not in splits["train"].column_names:
            columns = ", ".join(splits["train"].column_names)
            sys.exit(
                f"the data have no column {column!r}; they have {columns}: choose with --image_column_name and "
                "--label_column_name"
            )
    if not isinstance(splits["train"].features[data_args.label_column_name], ClassLabel):
        sys.exit(f"--label_column_name {data_args.label_column_name}: expected classes that have names (ClassLabel)")
    if "validation" not in splits:
        held_out = data_args.validation_split_percentage / 100
        parts = splits["train"].train_test_split(test_size=held_out, seed=training_args.seed)
        splits["train"], splits["validation"] = parts["train"], parts["test"]
        logger.info("held out %s training samples for validation", len(splits["validation"]))
    return splits


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
