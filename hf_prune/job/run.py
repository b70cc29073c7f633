"""The main job: the same model dense and pruned, trained alike, measured side by side, saved, reloaded, pushed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainingArguments, set_seed

from hf_prune.apply.verify import TOLERANCES
from hf_prune.calibration.batches import take, to_device
from hf_prune.checkpoint.saving import update_side_files
from hf_prune.errors import CheckpointError, PruneError, RecipeError, VerificationError
from hf_prune.hub.push import push_folder
from hf_prune.job.fit import check_fit, totals
from hf_prune.job.measure import latency_ms
from hf_prune.job.models import check_files, meta_model, model_class
from hf_prune.job.output import TRAINING, check_output, save, writing
from hf_prune.job.progress import Stages
from hf_prune.job.sources import load_splits, one_line, resolve
from hf_prune.job.tasks import Prepared, by_part, metrics_of, prepare
from hf_prune.pipeline import prune_
from hf_prune.planning import refuse_without_training
from hf_prune.recipe import Recipe
from hf_prune.recipe.schema import OutputSection
from hf_prune.report import PruningReport
from hf_prune.training import PruningTrainer
from hf_prune.training.checkpoints import last_complete
from hf_prune.training.pruner import require_known_parameters


BATCH_SIZES = (1, 8)
# card fields that a pruned model inherits from the one it was made from
_INHERITED = ("license", "license_name", "license_link", "language")


def run(recipe: Recipe, stages: Stages) -> PruningReport:
    """Do what `recipe` says, from loading to pushing. Every process of a distributed launch calls it.

    With a `training` section the model is fine-tuned twice from the same weights, without and with pruning; without
    one it is pruned in a single step. Both are evaluated. Checkpoints of training lie in `<output.dir>/training`.

    Args:
        recipe: with the sections `model` and `data`.
        stages: where progress is shown.

    Returns:
        The report, also saved beside the model in `output.dir`.

    Raises:
        PruneError: a mistake in the recipe, the data or the directories; nothing is half-written.
    """
    check(recipe)
    assert recipe.data is not None
    output = recipe.output or OutputSection()
    with stages.stage("data"), PartialState().main_process_first():
        task = prepare(recipe, *load_splits(recipe.data, recipe.seed))
    report = compare(recipe, task, Path(output.dir), stages)
    if output.push_to_hub and PartialState().is_main_process:
        with stages.stage("push"):
            report.content["pushed_to"] = push_folder(output.dir, _repo_id(output), private=output.private)
    return report


def check(recipe: Recipe) -> None:
    """All that can be known before data and weights are read: sections, directories, arguments, the model's sizes.

    Raises:
        PruneError: a mistake in one of them.
    """
    for section in ("model", "data"):
        if getattr(recipe, section) is None:
            raise RecipeError(
                f"`hf-prune run` needs the recipe's section {section!r}; `hf-prune recipes` lists recipes that have it"
            )
    assert recipe.model is not None and recipe.data is not None
    output = recipe.output or OutputSection()
    directory = Path(output.dir)
    resuming = bool((recipe.training or {}).get("resume_from_checkpoint"))
    check_output(directory, resuming=resuming)
    arguments(recipe, directory)
    if recipe.training is None:
        refuse_without_training(recipe)
    else:
        require_known_parameters(recipe)
    if output.push_to_hub:
        _check_push(_repo_id(output))
    resolve(recipe.data.name_or_path, "data.name_or_path")
    model = meta_model(recipe.model.name_or_path, recipe.model.task, recipe.model.revision)
    check_files(recipe.model)
    check_fit(recipe, model, totals(model))


def compare(recipe: Recipe, task: Prepared, directory: Path, stages: Stages) -> PruningReport:
    """Train and evaluate dense and pruned, measure both, save the pruned one and load it again."""
    was_there = directory.exists()
    try:
        return _compare(recipe, task, directory, stages)
    finally:
        if PartialState().is_main_process:
            _remove_empty(directory / TRAINING)
            if not was_there and directory.exists() and not any(directory.iterdir()):
                directory.rmdir()


def _compare(recipe: Recipe, task: Prepared, directory: Path, stages: Stages) -> PruningReport:
    resuming = bool((recipe.training or {}).get("resume_from_checkpoint"))
    if recipe.training is not None:  # how to run, not what: the recipe that is saved and resumed is without it
        without = {key: value for key, value in recipe.training.items() if key != "resume_from_checkpoint"}
        recipe = recipe.model_copy(update={"training": without})
    models: dict[str, Any] = {}
    metrics: dict[str, dict[str, float]] = {}
    parts: dict[str, dict[str, Any]] = {}
    report: PruningReport | None = None
    for side in ("dense", "pruned"):
        set_seed(recipe.seed)  # so that new heads begin alike
        trainer = _trainer(recipe if side == "pruned" else None, recipe, task, directory / TRAINING / side)
        if recipe.training is not None:
            with stages.stage(f"{side}: training") as bar, writing(directory / TRAINING / side):
                trainer.add_callback(bar)
                trainer.train(resume_from_checkpoint=_last_checkpoint(trainer) if resuming else None)
                trainer.remove_callback(bar)
            report = trainer.pruning_report
        elif side == "pruned":
            with stages.stage("pruning"):
                report = prune_(trainer.model, recipe, calibration=calibration_batches(recipe, task))
        with stages.stage(f"{side}: evaluation"):
            metrics[side] = metrics_of(trainer.evaluate())
            parts[side] = by_part(task, trainer)
        models[side] = trainer.model
    assert report is not None
    if PartialState().is_main_process:
        with stages.stage("measuring"):
            report.content["measured"] |= {"metrics": metrics, **_by_part(parts), **_measured(models, task)}
        with stages.stage("saving"):
            save(models, task.processor, report, recipe, directory)
            report.content["checkpoint"]["reload_difference"] = _reload_difference(recipe, task, models, directory)
        report.content["seconds"] |= {name.replace(": ", "_"): seconds for name, seconds in stages.seconds.items()}
        report.attach_(models["pruned"], _metadata(recipe))
        update_side_files(models["pruned"], directory)
    PartialState().wait_for_everyone()
    return report


def arguments(recipe: Recipe, directory: Path) -> TrainingArguments:
    """The recipe's `training` over defaults that fit a job: its seed, nothing reported or saved unless asked for.

    Raises:
        RecipeError: TrainingArguments refuses them.
    """
    given = recipe.training or {}
    defaults = {
        "seed": recipe.seed,
        "save_strategy": "no",
        "report_to": "none",
        "dataloader_pin_memory": torch.cuda.is_available(),
        "disable_tqdm": True,
    }
    try:
        return TrainingArguments(output_dir=str(directory), **{**defaults, **given})
    except (TypeError, ValueError, ImportError, OSError) as error:
        raise RecipeError(f"training: TrainingArguments says: {one_line(error)}") from error


def _repo_id(output: OutputSection) -> str:
    return output.repo_id or Path(output.dir).absolute().name


def _check_push(repo_id: str) -> None:
    """What would make a push fail after hours of work."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise RecipeError(f"output.repo_id: {one_line(error)}") from error
    if get_token() is None:
        raise PruneError("output.push_to_hub: there is no token; run `hf auth login` or set HF_TOKEN first")


def _trainer(pruning: Recipe | None, recipe: Recipe, task: Prepared, directory: Path) -> PruningTrainer:
    trainer = PruningTrainer(
        model=task.load_model(),
        args=arguments(recipe, directory),
        train_dataset=task.train,
        eval_dataset=task.evaluation,
        processing_class=task.processor,
        data_collator=task.collator,
        compute_metrics=task.compute_metrics,
        recipe=pruning if recipe.training is not None else None,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _last_checkpoint(trainer: PruningTrainer) -> str | None:
    """The last checkpoint of this side that was written to the end, if there is one."""
    args = trainer.args
    try:
        return str(
            last_complete(
                Path(args.output_dir or ""),
                args.world_size,
                is_pruned=trainer.recipe is not None,
                with_optimizer=not args.save_only_model,
            )
        )
    except CheckpointError:
        return None  # this side begins anew


def calibration_batches(recipe: Recipe, task: Prepared) -> list[dict[str, Any]]:
    """The first samples of the training data, as many as the recipe asks for, in its batches."""
    calibration = recipe.calibration
    loader = DataLoader(task.train, batch_size=calibration.batch_size, collate_fn=task.collator)
    return take((dict(batch) for batch in loader), min(calibration.samples, len(task.train)))


def _by_part(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Dense beside pruned, by class or domain; nothing where the data are of one kind."""
    about = parts["pruned"]
    if len(about["values"]) < 2:
        return {}
    values = {side: part["values"] for side, part in parts.items()}
    return {"by_part": {key: about[key] for key in ("of", "metric", "n_samples")} | values}


def _measured(models: Mapping[str, nn.Module], task: Prepared) -> dict[str, Any]:
    latency: dict[str, dict[str, float]] = {side: {} for side in models}
    for batch_size in BATCH_SIZES:
        for side, milliseconds in latency_ms(models, task.batch(batch_size)).items():
            latency[side][str(batch_size)] = milliseconds
    return {"latency_ms": latency}


@torch.no_grad()
def _reload_difference(recipe: Recipe, task: Prepared, models: Mapping[str, Any], directory: Path) -> float:
    """max|difference| / max|logit| between the model in memory and the one on disk.

    Raises:
        VerificationError: it is above the tolerance; the files stay, to look into.
    """
    assert recipe.model is not None
    model = models["pruned"].eval()
    parameter = next(model.parameters())
    again = (
        model_class(recipe.model.task).from_pretrained(directory, dtype=parameter.dtype).to(parameter.device).eval()
    )
    inputs = to_device(task.batch(2), parameter.device)
    expected, found = model(**inputs).logits.double(), again(**inputs).logits.double()
    difference = float((expected - found).abs().max() / expected.abs().max().clamp(min=1e-30))
    if not difference <= TOLERANCES[parameter.dtype]:
        raise VerificationError(
            f"the model loaded from {directory} differs from the one saved there by {difference:.1e} of the largest "
            "logit. This is a fault in hf_prune: please report it, with the recipe."
        )
    return difference


def _metadata(recipe: Recipe) -> dict[str, Any]:
    """Header of the card: the task, the data, and what the base model's own card says of license and language."""
    assert recipe.model is not None and recipe.data is not None
    output, data = recipe.output or OutputSection(), recipe.data
    fields: dict[str, Any] = {"pipeline_tag": recipe.model.task}
    fields |= {key: value for key, value in _base_card(recipe).items() if key in _INHERITED and value}
    if not data.name_or_path.startswith("package:") and not Path(data.name_or_path).exists():
        fields["datasets"] = [data.name_or_path]
        fields["dataset"] = {"type": data.name_or_path, "config": data.config_name, "split": data.eval_split}
    if output.push_to_hub and output.repo_id:
        fields["repo_id"] = output.repo_id
    return fields


def _base_card(recipe: Recipe) -> dict[str, Any]:
    from huggingface_hub import ModelCard
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalEntryNotFoundError

    assert recipe.model is not None
    path = resolve(recipe.model.name_or_path, "model.name_or_path")
    card = Path(path, "README.md")
    if Path(path).exists() and not card.exists():
        return {}
    try:
        return dict(ModelCard.load(str(card) if card.exists() else path).data.to_dict())
    except (HfHubHTTPError, HTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError):
        return {}  # no card, none that can be read or none within reach: nothing is inherited


def _remove_empty(directory: Path) -> None:
    """Trainer makes its folders whether it saves or not."""
    for path in (*sorted(directory.glob("*")), directory):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
