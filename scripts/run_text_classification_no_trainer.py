#!/usr/bin/env python
r"""Fine-tunes a text classifier while pruning it in a plain training loop, with Accelerate and `hf_prune.Pruner`.

On a Hub data set, with a recipe that is shipped (`hf-prune recipes` lists them) or one of your own:

    python scripts/run_text_classification_no_trainer.py \
        --model_name_or_path google-bert/bert-base-uncased \
        --dataset_name fancyzhx/ag_news --validation_split_name test \
        --recipe heads-and-neurons \
        --learning_rate 5e-5 --num_train_epochs 3 --per_device_train_batch_size 32 \
        --output_dir outputs/ag-news --push_to_hub --hub_model_id ag-news-small

On files of your own (csv, json, jsonl or parquet, with the columns `text` and `label`), in two processes:

    torchrun --nproc_per_node 2 scripts/run_text_classification_no_trainer.py \
        --model_name_or_path google-bert/bert-base-uncased \
        --train_file train.csv --validation_file validation.csv \
        --recipe recipe.yaml --gradient_accumulation_steps 2 --output_dir outputs/mine

`accelerate launch` starts it as well; processes without a GPU need `--use_cpu`. With `--checkpoint_every_epoch` an
interrupted run goes on with `--resume_from_checkpoint outputs/mine/epoch_1`. Without `--recipe` this is plain
fine-tuning: the lines that pruning adds to a script of Transformers end in `# pruning`.
"""

import argparse
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import evaluate
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import ClassLabel, DatasetDict, Value, load_dataset
from huggingface_hub import HfApi
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    SchedulerType,
    get_scheduler,
)

import hf_prune  # pruning


logger = logging.getLogger(__name__)

LOADERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model_name_or_path", required=True, help="A Hub id or a local directory.")
    add("--recipe", help="A YAML file or a shipped recipe; none: plain training.")  # pruning
    add("--output_dir", required=True, help="Where the model goes.")
    add("--dataset_name", help="A Hub id or a local directory.")
    add("--dataset_config_name", help="Which configuration of it.")
    add("--train_file", help="csv, json, jsonl or parquet.")
    add("--validation_file", help="As --train_file.")
    add("--train_split_name", default="train", help="The split to train on.")
    add("--validation_split_name", default="validation", help="The split to evaluate on.")
    add("--text_column_name", default="text", help="The column of the text.")
    add("--label_column_name", default="label", help="The column of the class: a name or a number.")
    add("--max_seq_length", type=int, default=128, help="Longer texts are cut, in tokens.")
    add("--max_train_samples", type=int, help="Train on so many samples only.")
    add("--max_eval_samples", type=int, help="Evaluate on so many samples only.")
    add("--metric_name", default="accuracy", help="A metric of `evaluate`: its name or local folder.")
    add("--per_device_train_batch_size", type=int, default=8, help="Samples of a forward pass, on each device.")
    add("--per_device_eval_batch_size", type=int, default=8, help="The same, in evaluation.")
    add("--gradient_accumulation_steps", type=int, default=1, help="Forward passes of one optimizer step.")
    add("--learning_rate", type=float, default=5e-5, help="The largest one.")
    add("--weight_decay", type=float, default=0.0, help="Of AdamW; biases and norms have none.")
    add("--max_grad_norm", type=float, default=1.0, help="Gradients are clipped to this norm.")
    add("--num_train_epochs", type=int, default=3, help="Passes over the training data.")
    add("--max_train_steps", type=int, help="Optimizer steps, in place of epochs.")
    add("--lr_scheduler_type", type=SchedulerType, default="linear", help="How the learning rate falls.")
    add("--num_warmup_steps", type=int, default=0, help="Optimizer steps in which it rises.")
    add("--seed", type=int, default=42, help="Of the data's order, new heads and dropout.")
    add("--use_cpu", action="store_true", help="Leave accelerators alone; needed for several processes on a CPU.")
    add("--checkpoint_every_epoch", action="store_true", help="Keep what resuming needs in output_dir/epoch_N.")
    add("--resume_from_checkpoint", help="A folder epoch_N of an earlier run with the same arguments.")
    add("--push_to_hub", action="store_true", help="Upload the model when it is done.")
    add("--hub_model_id", help="Name or owner/name of the repository; by default named after output_dir.")
    add("--hub_token", help="For the Hub; else the one that `hf auth login` stored.")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    accelerator = Accelerator(cpu=args.use_cpu, gradient_accumulation_steps=args.gradient_accumulation_steps)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    logger.setLevel(logging.INFO if accelerator.is_main_process else logging.WARNING)
    if int(os.environ.get("WORLD_SIZE", 1)) != accelerator.num_processes:
        sys.exit("each of these processes would train on its own: on a machine without GPU, add --use_cpu")

    # Mistakes in the recipe show here, before anything is loaded.
    recipe = hf_prune.Recipe.load(args.recipe) if args.recipe else None  # pruning
    set_seed(args.seed)
    output_dir = Path(args.output_dir)

    splits = load_splits(args)
    names, number_of = classes(splits, args.label_column_name)
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    model = AutoModelForSequenceClassification.from_pretrained(
        args.model_name_or_path,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
        dtype=torch.float32,
    )

    def encode(batch: dict) -> dict:
        encoded = tokenizer(batch[args.text_column_name], truncation=True, max_length=args.max_seq_length)
        return {**encoded, "labels": [number_of[label] for label in batch[args.label_column_name]]}

    limits = {"train": args.max_train_samples, "validation": args.max_eval_samples}
    with accelerator.main_process_first():
        for name, split in splits.items():
            split = split.select(range(min(limits[name] or len(split), len(split))))
            splits[name] = split.map(encode, batched=True, remove_columns=split.column_names, desc=name)
    collator = DataCollatorWithPadding(tokenizer)
    train_loader = DataLoader(splits["train"], args.per_device_train_batch_size, shuffle=True, collate_fn=collator)
    eval_loader = DataLoader(splits["validation"], args.per_device_eval_batch_size, collate_fn=collator)

    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate)
    model, optimizer, train_loader, eval_loader = accelerator.prepare(model, optimizer, train_loader, eval_loader)

    steps_per_epoch = math.ceil(len(train_loader) / args.gradient_accumulation_steps)
    n_steps = args.max_train_steps or args.num_train_epochs * steps_per_epoch
    # not prepared: Accelerate would step it once for each process
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer, args.num_warmup_steps, n_steps)
    accelerator.register_for_checkpointing(scheduler)

    pruner = None
    if recipe is not None:  # pruning

        def calibration() -> Iterator[dict]:
            """The same first samples on every process; the pruner deals them out itself."""
            wanted = range(min(recipe.calibration.samples, len(splits["train"])))
            yield from DataLoader(splits["train"].select(wanted), recipe.calibration.batch_size, collate_fn=collator)

        pruner = hf_prune.Pruner(model, optimizer, recipe, n_steps=n_steps, calibration=calibration)  # pruning
        accelerator.register_for_checkpointing(pruner)  # pruning

    first_epoch = 0
    if args.resume_from_checkpoint:
        accelerator.load_state(args.resume_from_checkpoint)
        first_epoch = int(Path(args.resume_from_checkpoint).name.removeprefix("epoch_"))

    metric = load_metric(args.metric_name)
    n_done = first_epoch * steps_per_epoch
    bar = tqdm(total=n_steps, initial=n_done, disable=not accelerator.is_main_process, desc="training")
    for epoch in range(first_epoch, math.ceil(n_steps / steps_per_epoch)):
        model.train()
        train_loader.set_epoch(epoch)
        for batch in train_loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                optimizer.step()
                if pruner is not None:
                    pruner.step()  # pruning
                if accelerator.sync_gradients:
                    scheduler.step()
                    bar.update()
                    n_done += 1
                optimizer.zero_grad()
            if n_done == n_steps:
                break
        logger.info("epoch %s: %s", epoch + 1, evaluated(model, eval_loader, accelerator, metric))
        if args.checkpoint_every_epoch:
            accelerator.save_state(output_dir / f"epoch_{epoch + 1}")
    bar.close()

    if pruner is not None:
        report = pruner.finish(
            inputs="training"
        )  # pruning: what was masked leaves; the optimizer is stale from here on
    model = accelerator.unwrap_model(model)
    results = evaluated(model, eval_loader, accelerator, metric)
    logger.info("the model that is saved: %s", results)

    if accelerator.is_main_process:
        card = {"pipeline_tag": "text-classification"}
        if args.push_to_hub:
            api = HfApi(token=args.hub_token)
            card["repo_id"] = api.create_repo(args.hub_model_id or output_dir.absolute().name, exist_ok=True).repo_id
        if pruner is not None:
            report.content["measured"]["metrics"] = {"pruned": results}  # pruning: for the card
            report.attach_(model, card)  # pruning
            print(report)  # pruning
        model.save_pretrained(output_dir)
        tokenizer.save_pretrained(output_dir)
        (output_dir / "all_results.json").write_text(json.dumps(results, indent=2) + "\n")
        if args.push_to_hub:
            api.upload_folder(repo_id=card["repo_id"], folder_path=output_dir, ignore_patterns=["epoch_*", ".*"])
            logger.info("pushed to %s", card["repo_id"])
    accelerator.end_training()


@torch.no_grad()
def evaluated(model: torch.nn.Module, loader: DataLoader, accelerator: Accelerator, metric: Callable) -> dict:
    """The metric over the whole evaluation set, on every process."""
    model.eval()
    predictions, references = [], []
    for batch in loader:
        gathered = accelerator.gather_for_metrics((model(**batch).logits.argmax(dim=-1), batch["labels"]))
        predictions += gathered[0].tolist()
        references += gathered[1].tolist()
    return metric(predictions=predictions, references=references)


def load_splits(args: argparse.Namespace) -> DatasetDict:
    """`train` and `validation`, shuffled: their first samples are any samples."""
    if args.dataset_name is not None:
        loaded = load_dataset(args.dataset_name, args.dataset_config_name)
        names = {"train": args.train_split_name, "validation": args.validation_split_name}
        for name, split in names.items():
            if split not in loaded:
                sys.exit(f"--{name}_split_name {split}: the data set has {', '.join(loaded)}")
        splits = DatasetDict({name: loaded[split] for name, split in names.items()})
    else:
        files = {"train": args.train_file, "validation": args.validation_file}
        splits = DatasetDict()
        for name, file in files.items():
            if file is None or not Path(file).is_file() or Path(file).suffix not in LOADERS:
                sys.exit(f"--{name}_file {file}: expected an existing file that ends in {', '.join(LOADERS)}")
            splits[name] = load_dataset(LOADERS[Path(file).suffix], data_files=file, split="train")
    for column in (args.text_column_name, args.label_column_name):
        if column not in splits["train"].column_names:
            columns = ", ".join(splits["train"].column_names)
            sys.exit(
                f"the data have no column {column!r}; they have {columns}: choose with --text_column_name and "
                "--label_column_name"
            )
    return splits.shuffle(seed=args.seed)


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
