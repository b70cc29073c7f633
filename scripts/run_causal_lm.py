#!/usr/bin/env python
r"""Fine-tunes a causal language model while pruning it, measures perplexity, saves it and can push it to the Hub.

On a Hub data set, with a recipe that is shipped (`hf-prune recipes` lists them) or one of your own:

    python scripts/run_causal_lm.py \
        --model_name_or_path HuggingFaceTB/SmolLM2-135M \
        --dataset_name Salesforce/wikitext --dataset_config_name wikitext-2-raw-v1 \
        --recipe heads-and-neurons \
        --do_train --do_eval --block_size 512 \
        --learning_rate 5e-5 --num_train_epochs 1 --per_device_train_batch_size 8 \
        --output_dir outputs/wikitext --push_to_hub

On text of your own (txt, csv, json, jsonl or parquet), in two processes:

    torchrun --nproc_per_node 2 scripts/run_causal_lm.py \
        --model_name_or_path HuggingFaceTB/SmolLM2-135M \
        --train_file train.txt --validation_file validation.txt \
        --recipe recipe.yaml --do_train --do_eval --output_dir outputs/mine

Processes without a GPU need `--use_cpu`. With all arguments in a file: `python scripts/run_causal_lm.py
arguments.yaml` (or .json). An interrupted run goes on with `--resume_from_checkpoint last`. Without `--recipe` this is
plain fine-tuning: the lines that pruning adds to a script of Transformers end in `# pruning`.
"""

import logging
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import evaluate
import numpy as np
import torch
from datasets import DatasetDict, load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    EvalPrediction,
    HfArgumentParser,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

import hf_prune  # pruning


logger = logging.getLogger(__name__)

LOADERS = {".txt": "text", ".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


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


@dataclass
class DataArguments:
    """Which text to train and evaluate on."""

    dataset_name: str | None = field(default=None, metadata={"help": "A Hub id or a local directory."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Which configuration of it."})
    train_file: str | None = field(default=None, metadata={"help": "txt, csv, json, jsonl or parquet."})
    validation_file: str | None = field(default=None, metadata={"help": "As train_file."})
    train_split_name: str = field(default="train", metadata={"help": "The split to train on."})
    validation_split_name: str = field(default="validation", metadata={"help": "The split to evaluate on."})
    validation_split_percentage: int = field(
        default=10, metadata={"help": "How much of the training data to hold out where there is no validation split."}
    )
    text_column_name: str = field(default="text", metadata={"help": "The column of the text."})
    block_size: int | None = field(
        default=None, metadata={"help": "Tokens of a sample; by default what the model can take, at most 1024."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many blocks only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on so many blocks only."})
    metric_name: str = field(
        default="accuracy", metadata={"help": "A metric of `evaluate`: its name or local folder."}
    )
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes to tokenize with."})


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
    column = data_args.text_column_name
    if column not in splits["train"].column_names:
        columns = ", ".join(splits["train"].column_names)
        sys.exit(f"the data have no column {column!r}; they have {columns}: choose with --text_column_name")

    tokenizer = AutoTokenizer.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        token=model_args.token,
        trust_remote_code=model_args.trust_remote_code,
    )
    model = AutoModelForCausalLM.from_pretrained(
        model_args.model_name_or_path,
        dtype=model_args.dtype,
        revision=model_args.model_revision,
        token=model_args.token,
        trust_remote_code=model_args.trust_remote_code,
    )
    longest = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
    block_size = data_args.block_size or min(longest, 1024)

    def blocks(batch: dict) -> dict:
        """Texts one after the other, cut into blocks of equal length; the rest is dropped."""
        ids = list(chain.from_iterable(tokenizer(batch[column])["input_ids"]))
        cut = [ids[i : i + block_size] for i in range(0, len(ids) - block_size + 1, block_size)]
        return {"input_ids": cut, "labels": [list(block) for block in cut]}

    limits = {"train": data_args.max_train_samples, "validation": data_args.max_eval_samples}
    with training_args.main_process_first(desc="tokenization"):
        for name, split in splits.items():
            split = split.map(
                blocks,
                batched=True,
                remove_columns=split.column_names,
                num_proc=data_args.preprocessing_num_workers,
                desc=name,
            )
            if len(split) == 0:
                sys.exit(f"the {name} data give no block of {block_size} tokens; lower --block_size")
            splits[name] = split.select(range(min(limits[name] or len(split), len(split))))

    metric = load_metric(data_args.metric_name)

    def most_likely(logits: torch.Tensor | tuple, labels: torch.Tensor) -> torch.Tensor:
        """Of each position: all logits of an evaluation set would fill the memory."""
        return (logits[0] if isinstance(logits, tuple) else logits).argmax(dim=-1)

    def compute_metrics(p: EvalPrediction) -> dict[str, float]:
        # what position t predicts is the token at t + 1
        return metric(predictions=p.predictions[:, :-1].reshape(-1), references=p.label_ids[:, 1:].reshape(-1))

    trainer = hf_prune.PruningTrainer(  # pruning
        model=model,
        args=training_args,
        train_dataset=splits["train"] if training_args.do_train else None,
        eval_dataset=splits["validation"],
        processing_class=tokenizer,
        data_collator=default_data_collator,
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=most_likely,
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
        metrics["perplexity"] = math.exp(min(metrics["eval_loss"], 700))  # more would overflow
        metrics["eval_samples"] = len(splits["validation"])
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)

    card = {"finetuned_from": model_args.model_name_or_path, "tasks": "text-generation"}
    if data_args.dataset_name is not None:
        card["dataset"] = card["dataset_tags"] = data_args.dataset_name
    if training_args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)


def load_splits(data_args: DataArguments, training_args: TrainingArguments, token: str | None) -> DatasetDict:
    """`train` and `validation`; the second held out of the first where there is none."""
    names = {"train": data_args.train_split_name, "validation": data_args.validation_split_name}
    if data_args.dataset_name is not None:
        loaded = load_dataset(data_args.dataset_name, data_args.dataset_config_name, token=token)
        if names["train"] not in loaded:
            sys.exit(f"--train_split_name {names['train']}: the data set has {', '.join(loaded)}")
        splits = DatasetDict({name: loaded[split] for name, split in names.items() if split in loaded})
    else:
        if data_args.train_file is None:
            sys.exit("there are no data: give --dataset_name or --train_file")
        splits = DatasetDict()
        for name in names:
            file = getattr(data_args, f"{name}_file")
            if file is None:
                continue
            if not Path(file).is_file() or Path(file).suffix not in LOADERS:
                sys.exit(f"--{name}_file {file}: expected an existing file that ends in {', '.join(LOADERS)}")
            kind = LOADERS[Path(file).suffix]
            options = {"keep_linebreaks": True} if kind == "text" else {}
            splits[name] = load_dataset(kind, data_files=file, split="train", **options)
    if "validation" not in splits:
        # the end of the text, not lines from everywhere: neighbours of training lines would be easy to predict
        n_train = round(len(splits["train"]) * (1 - data_args.validation_split_percentage / 100))
        held_out = range(n_train, len(splits["train"]))
        splits["validation"], splits["train"] = (
            splits["train"].select(held_out),
            splits["train"].select(range(n_train)),
        )
        logger.info("held out the last %s training texts for validation", len(held_out))
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
