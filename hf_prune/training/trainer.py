"""`PruningTrainer`: Trainer with a recipe. Without one it is Trainer."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Seq2SeqTrainer, Trainer, TrainerCallback

from hf_prune.apply.masks import enforce_
from hf_prune.calibration.batches import n_samples, take
from hf_prune.checkpoint.renamed import load_renamed_
from hf_prune.checkpoint.saving import add_side_files, is_pruned
from hf_prune.errors import RecipeError, VerificationError
from hf_prune.planning import RecipeLike
from hf_prune.recipe import Recipe
from hf_prune.report import PruningReport
from hf_prune.training.pruner import Pruner, require_known_parameters, unwrap
from hf_prune.training.state import load_state, save_state


if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


# of what `Trainer.evaluate` says, the endings of what tells of the evaluation
_NOT_OF_THE_MODEL = ("runtime", "_per_second", "_time", "epoch")


class PruningMixin(_Base):
    """Pruning for any subclass of `Trainer`: `class MyTrainer(PruningMixin, SomeTrainer)`.

    Prunes on the recipe's schedule while it trains. At the end, once the best model is loaded, what is masked is removed,
    the smaller model verified, and `self.model` is that model; `self.pruning_report` says what happened.

    Args:
        recipe: a `Recipe`, a mapping, or a path to YAML; None changes nothing at all.
        calibration_dataset: for criteria that look at data; else the first `calibration.samples` of the training set.
        teacher_model: for distillation, which this version has not.
    """

    optimizer: Any  # Trainer's, and none once the shapes have changed

    def __init__(
        self,
        *args: Any,
        recipe: RecipeLike | None = None,
        calibration_dataset: Any = None,
        teacher_model: nn.Module | None = None,
        **kwargs: Any,
    ):
        if teacher_model is not None:
            raise RecipeError("teacher_model is for distillation, which is not supported in this version of hf_prune")
        self.recipe = None if recipe is None else Recipe.load(recipe)
        if self.recipe is not None:
            require_known_parameters(self.recipe)
        super().__init__(*args, **kwargs)
        self.calibration_dataset = calibration_dataset
        self.pruner: Pruner | None = None
        self.pruning_report: PruningReport | None = None
        self._resumed_from: str | None = None
        self._finished: nn.Module | None = None
        if self.recipe is not None:
            self.add_callback(_PruneAtSteps(self))

    # Trainer's own methods, each extended where pruning has a part

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.recipe is not None:
            load_renamed_(unwrap(self.model), resume_from_checkpoint)
        self._resumed_from = resume_from_checkpoint

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.recipe is not None and self.state.best_model_checkpoint is not None:
            load_renamed_(unwrap(self.model), self.state.best_model_checkpoint)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.pruner is not None and self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            save_state(self.pruner.state_dict(), folder)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        if self.pruner is not None and not self.pruner.is_final:
            return False  # a model that is not yet as sparse as asked for can't be the best one
        return super()._determine_best_metric(metrics, trial)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> dict[str, float]:
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix, **kwargs)
        if self.pruning_report is not None and unwrap(self.model) is self._finished:
            # what the pruned model was measured to be goes into its report and card, for the next save or push
            found = {
                name.removeprefix(f"{metric_key_prefix}_"): float(value)
                for name, value in metrics.items()
                if isinstance(value, (int, float)) and not name.endswith(_NOT_OF_THE_MODEL)
            }
            self.pruning_report.content["measured"]["metrics"] = {"pruned": found}
            self.pruning_report.attach_(self._finished)
        return metrics

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.pruner is not None:
            logs = {**logs, **{f"sparsity/{target}": value for target, value in self.pruner.sparsity().items()}}
        super().log(logs, *args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        output = super()._finalize_training(*args, **kwargs)
        if self.pruner is not None:
            self._finish_pruning(self.pruner)
        return output

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        model = unwrap(self.model)
        if self.is_world_process_zero() and is_pruned(model):
            # a model that was pruned before this training: Trainer copies config and weights only
            add_side_files(model, Path(self.args.output_dir))
        super()._push_from_checkpoint(checkpoint_folder)

    # pruning's own

    def _begin_pruning(self) -> None:
        assert self.recipe is not None
        if unwrap(self.model) is self._finished:
            return  # pruned by the first `train()`; a second one trains what is left, and single weights stay masked
        begun = self.pruner  # of a training that broke off: by an error, or to start anew with a smaller batch
        if begun is not None:
            begun.detach()
        self.pruner = Pruner(
            self.model,
            self.optimizer,
            self.recipe,
            n_steps=self.state.max_steps,
            calibration=self._calibration_batches,
        )
        if begun is not None:
            self.pruner.plan = begun.plan
        if self._resumed_from is not None:
            self.pruner.load_state_dict(load_state(Path(self._resumed_from)))
            self._resumed_from = None

    def _pruning_step(self) -> None:
        if self.pruner is not None:
            self.pruner.step()
        elif self._finished is not None:
            enforce_(self._finished)

    def _finish_pruning(self, pruner: Pruner) -> None:
        inputs = "training" if self.calibration_dataset is None else "calibration"
        try:
            self.pruning_report = pruner.finish(inputs=inputs)
        except VerificationError:
            folder = Path(self.args.output_dir) / "masked-model"
            self.save_model(str(folder), _internal_call=True)
            if self.args.should_save:
                save_state(pruner.state_dict(), folder)
            raise
        finally:
            self.pruner = None
        self._finished = pruner.model
        # the optimizer and the wrapped model hold parameters that are no longer the model's
        self.model = self.model_wrapped = pruner.model
        self.optimizer, self.lr_scheduler = None, None

    def _calibration_batches(self) -> list[dict[str, Any]]:
        """The same on every process, at every update; statistics deal them out themselves. Random numbers are restored."""
        assert self.recipe is not None
        calibration = self.recipe.calibration
        dataset = self.calibration_dataset if self.calibration_dataset is not None else self.train_dataset
        collator = self.data_collator
        if hasattr(dataset, "column_names"):
            dataset = self._remove_unused_columns(dataset, description="calibration")
        else:
            collator = self._get_collator_with_removed_columns(collator, description="calibration")
        batch_size = min(calibration.batch_size, calibration.samples)
        with _drawing_from(self.recipe.seed):  # collators may mask tokens by chance
            loader = DataLoader(dataset, batch_size=batch_size, collate_fn=collator)
            n_batches = -(-calibration.samples // batch_size)
            batches = [dict(batch) for batch in islice(loader, n_batches)]  # fewer where the data ends before
        n_available = sum(n_samples(batch) for batch in batches)
        return take(batches, min(n_available, calibration.samples) or None)


@contextmanager
def _drawing_from(seed: int) -> Iterator[None]:
    """All random numbers from `seed`, and afterwards as if none had been drawn."""
    plain, of_numpy = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng():
        try:
            random.seed(seed)
            numpy.random.seed(seed % 2**32)
            torch.manual_seed(seed)
            yield
        finally:
            random.setstate(plain)
            numpy.random.set_state(of_numpy)


class PruningTrainer(PruningMixin, Trainer):
    """`Trainer` with `recipe`, `calibration_dataset` and `teacher_model`; see `PruningMixin`."""


class PruningSeq2SeqTrainer(PruningMixin, Seq2SeqTrainer):
    """`Seq2SeqTrainer` with `recipe`, `calibration_dataset` and `teacher_model`; see `PruningMixin`."""


class _PruneAtSteps(TrainerCallback):
    """Calls the trainer's pruner where Trainer has no method to extend."""

    def __init__(self, trainer: PruningMixin):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._begin_pruning()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._pruning_step()
