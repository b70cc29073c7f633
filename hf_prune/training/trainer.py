"""`PruningTrainer`: Trainer with a recipe. Without one it is Trainer."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Seq2SeqTrainer, Trainer, TrainerCallback

from hf_prune.apply.masks import enforce_, masks_of
from hf_prune.calibration.batches import n_samples, take
from hf_prune.checkpoint.renamed import load_renamed_
from hf_prune.checkpoint.saving import add_side_files, is_pruned
from hf_prune.errors import RecipeError, VerificationError
from hf_prune.plan import PruningPlan
from hf_prune.planning import RecipeLike
from hf_prune.recipe import Recipe
from hf_prune.report import PruningReport
from hf_prune.training.checkpoints import begin_checkpoint, last_complete, without_token
from hf_prune.training.distillation import Distiller, copy_of, save_teacher
from hf_prune.training.pruner import Pruner, require_known_parameters, unwrap
from hf_prune.training.schedule import first_step
from hf_prune.training.sharding import ShardedPruner, require_shardable, skeleton_of
from hf_prune.training.shrinking import require_comparable_layers, resize_
from hf_prune.training.state import PLAIN as STATE
from hf_prune.training.state import load_state, require_same_recipe, save_state
from hf_prune.training.zero import ZeroPruner


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
        teacher_model: for the recipe's `distillation`; it is frozen. Without one it is a copy of the model as it is when the
            schedule begins.

    Raises:
        RecipeError: the recipe can't be accepted, or has no use for what was passed.
    """

    optimizer: Any  # Trainer's, and none once the shapes have changed
    model: Any
    model_wrapped: Any

    def __init__(
        self,
        *args: Any,
        recipe: RecipeLike | None = None,
        calibration_dataset: Any = None,
        teacher_model: nn.Module | None = None,
        **kwargs: Any,
    ):
        if teacher_model is not None and (recipe is None or Recipe.load(recipe).distillation is None):
            raise RecipeError(
                "there is a teacher_model, and the recipe has no section `distillation`; add one, such as "
                "distillation: {temperature: 2, weight: 0.5}"
            )
        self.recipe = None if recipe is None else Recipe.load(recipe)
        if self.recipe is not None:
            require_known_parameters(self.recipe)
        super().__init__(*args, **kwargs)
        self._is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if self.recipe is not None:
            require_comparable_layers(self.recipe)
            if self._is_sharded:
                require_shardable(self.recipe, self.model)
        self.calibration_dataset = calibration_dataset
        self.pruner: Pruner | None = None
        self.pruning_report: PruningReport | None = None
        self._resumed_from: str | None = None
        self._has_updated = False  # the masks, in the step that ends
        self._is_resized = False  # to the shapes of the checkpoint that it resumes from
        self._dense: nn.Module | None = None  # before that, for a teacher
        self._begun_on: nn.Module | None = None  # what `pruner` was made for
        self._skeleton: nn.Module | None = None  # of what is sharded,
        self._sharded_from: nn.Module | None = None  # which was this one
        self._finished: nn.Module | None = None
        self.teacher_model = teacher_model
        self._distiller: Distiller | None = None
        if self.recipe is not None:
            self.add_callback(_PruneAtSteps(self))

    # Trainer's own methods, each extended where pruning has a part

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.recipe is not None and (Path(resume_from_checkpoint) / STATE).is_file():
            self._shrink_as_in(Path(resume_from_checkpoint))
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.recipe is not None and not self._is_sharded:
            load_renamed_(unwrap(self.model), resume_from_checkpoint)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        if self.recipe is not None:
            self._resumed_from = resume_from_checkpoint
            if (
                self._is_sharded and self._sharded_from is not self.model
            ):  # the first, or that of a search's next trial
                self._skeleton, self._sharded_from = skeleton_of(self.model), self.model
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.recipe is not None and self.state.best_model_checkpoint is not None and not self._is_sharded:
            load_renamed_(unwrap(self.model), self.state.best_model_checkpoint)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.pruner is not None and self.args.should_save:
            # first, since Trainer ends with the file that says that all is there, and then deletes older checkpoints
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            begin_checkpoint(folder)
            if self._distiller is not None and self.teacher_model is None:
                save_teacher(self._distiller.teacher, folder)
            save_state(self.pruner.state_dict(), folder)
        super()._save_checkpoint(model, trial)

    def _save(self, *args: Any, **kwargs: Any) -> None:
        with self._without_token():
            super()._save(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not (self._is_sharded and self.model is self._finished):
            super().save_model(output_dir, _internal_call)
            return
        # whole on each process, and FSDP's and DeepSpeed's own ways would look for parts
        if self.args.should_save:
            self._save(output_dir or self.args.output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.pruner is not None:
            self.accelerator.wait_for_everyone()  # each process writes its own, before the first says that all is there

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if self.recipe is not None and resume_from_checkpoint is True:
            resume_from_checkpoint = str(
                last_complete(
                    Path(self.args.output_dir), self.args.world_size, with_optimizer=not self.args.save_only_model
                )
            )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        distiller, pruner = self._distiller, self.pruner
        if distiller is None or pruner is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch, **kwargs)
        batch = dict(inputs)  # where it smooths labels Trainer takes them out
        with distiller.watching():
            task, outputs = super().compute_loss(model, inputs, True, num_items_in_batch, **kwargs)
        is_scaled = (
            self.args.average_tokens_across_devices
            and (self.model_accepts_loss_kwargs or self.compute_loss_func)
            and num_items_in_batch is not None
        )
        with self.accelerator.autocast():
            loss = distiller.loss(
                task,
                outputs,
                batch,
                pruner.plan.masks if pruner.plan else masks_of(pruner.model),
                n_labels=num_items_in_batch,
                own_loss=self.label_smoother is None and self.compute_loss_func is None,
                scale=self.accelerator.num_processes if is_scaled else 1,
            )
        return (loss, outputs) if return_outputs else loss

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
        if self.pruner is None:
            return super().log(logs, *args, **kwargs)
        sparsity = {f"sparsity/{kind}": value for kind, value in self.pruner.sparsity().items()}
        told = {**logs, **sparsity}
        super().log(told, *args, **kwargs)
        # what Trainer adds, such as the epoch, is in what `evaluate` returns too; sparsity is no metric
        logs.update({name: value for name, value in told.items() if name not in sparsity})
        return None

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
        with self._without_token():
            super()._push_from_checkpoint(checkpoint_folder)

    # pruning's own

    def _without_token(self) -> AbstractContextManager[None]:
        prunes = self.recipe is not None or is_pruned(unwrap(self.model))
        return without_token(self.args) if prunes else nullcontext()

    def _begin_pruning(self) -> None:
        assert self.recipe is not None
        if unwrap(self.model) is self._finished:
            return  # pruned by the first `train()`; a second one trains what is left, and single weights stay masked
        begun = self.pruner  # of a training that broke off: by an error, or to start anew with a smaller batch
        if begun is not None:
            begun.detach()
        if self._begun_on is not unwrap(self.model):
            # another model: the next trial of a search, which has let go of the last one's
            begun, self._begun_on, self._finished = None, unwrap(self.model), None
        make: Any = Pruner
        if self._skeleton is not None:
            make = partial(ZeroPruner if self.is_deepspeed_enabled else ShardedPruner, skeleton=self._skeleton)
        self.pruner = make(
            self.model_wrapped,
            self.optimizer,
            self.recipe,
            n_steps=self.state.max_steps,
            calibration=self._calibration_batches,
            distills=True,
            inputs="training" if self.calibration_dataset is None else "calibration",
            is_shrunk=self._is_resized or (begun is not None and begun.is_shrunk),
        )
        if begun is not None:
            self.pruner.plan, self.pruner.report = begun.plan, begun.report
        resumed_from, self._resumed_from = self._resumed_from, None
        state = None if resumed_from is None else load_state(Path(resumed_from))
        self._begin_distilling(
            None if state is None or resumed_from is None else (state["n_done"], Path(resumed_from))
        )
        if state is not None:
            self.pruner.load_state_dict(state)

    def _pruning_step(self) -> None:
        if self.pruner is not None:
            if self._distiller is None and self._begins_to_distill(self.pruner.n_done + 1):
                self._distill_from(copy_of(self.pruner.model))
            with self._keeping_the_masked_model(self.pruner):
                self._has_updated = self.pruner.step()
        elif self._finished is not None:
            enforce_(self._finished)

    def _log_update(self) -> None:
        if self.pruner is not None and self._has_updated:
            is_due = self.control.should_log  # Trainer's own log, which this one doesn't stand for
            # not `self.log`: trainers add to it what they gather between two logs of their own
            Trainer.log(self, self.pruner.scalars())
            self.control.should_log = is_due
        self._has_updated = False

    def _begins_to_distill(self, n_done: int) -> bool:
        assert self.recipe is not None
        return self.recipe.distillation is not None and n_done >= first_step(self.recipe, self.state.max_steps)

    def _shrink_as_in(self, folder: Path) -> None:
        """Where a checkpoint is of a model that had been shrunk, give this one its shapes, and the optimizer too."""
        assert self.recipe is not None
        state = load_state(folder)
        require_same_recipe(state["recipe"], self.recipe)
        self._dense, self._is_resized = None, False
        model = unwrap(self.model)
        if state.get("shrunk") is None or model is self._finished:
            return
        if self.recipe.distillation is not None and self.teacher_model is None:
            self._dense = copy.deepcopy(model)
        self.create_optimizer()  # of the dense model, whose order of parameters the checkpoint's has
        resize_(
            model,
            getattr(self.optimizer, "optimizer", self.optimizer),
            PruningPlan.from_parts(state["plan"], state["tensors"]),
        )
        self._is_resized = True

    def _begin_distilling(self, resumed: tuple[int, Path] | None) -> None:
        """With a teacher that is there from the beginning, or that the checkpoint holds: (steps done, folder)."""
        assert self.recipe is not None and self.pruner is not None
        begun, self._distiller = self._distiller, None  # of a training that broke off
        model = self.pruner.model
        if self.recipe.distillation is None:
            return
        if self.teacher_model is None and self._is_sharded:
            raise RecipeError(
                "distillation without a teacher_model copies the model, and no process has the whole of it under FSDP or "
                "DeepSpeed; pass teacher_model=, loaded anew"
            )
        if self.teacher_model is not None:
            self._distill_from(self.teacher_model, measure=resumed is None and begun is None)
        elif resumed is not None and self._begins_to_distill(resumed[0]):
            self._distill_from(copy_of(self._dense or model, resumed[1]), measure=False)
            self._dense = None
        elif begun is not None:
            self._distill_from(begun.teacher, measure=False)
        elif self._begins_to_distill(0):
            self._distill_from(copy_of(model))

    def _distill_from(self, teacher: nn.Module, *, measure: bool = True) -> None:
        """Distill from now on; the teacher's own metrics are logged where there is an evaluation, as `teacher_…`."""
        assert self.recipe is not None and self.recipe.distillation is not None and self.pruner is not None
        self._distiller = Distiller(self.recipe.distillation, self.pruner.model, teacher, self._skeleton)
        if not measure or self.eval_dataset is None or self.args.eval_strategy == "no":
            return
        named = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        pupil = self.model, self.model_wrapped
        self.model = self.model_wrapped = teacher
        try:
            with _drawing_from(self.recipe.seed):
                for name, dataset in named.items():
                    prefix = f"teacher_{name}" if name else "teacher"
                    output = self.evaluation_loop(
                        self.get_eval_dataloader(dataset),
                        "Evaluation of the teacher",
                        prediction_loss_only=True if self.compute_metrics is None else None,
                        metric_key_prefix=prefix,
                    )
                    self.log(output.metrics)
        finally:
            self.model, self.model_wrapped = pupil

    def _finish_pruning(self, pruner: Pruner) -> None:
        try:
            with self._keeping_the_masked_model(pruner):
                self.pruning_report = pruner.finish()
        finally:
            self.pruner = self._distiller = None
        self._finished = pruner.model
        # the optimizer and the wrapped model hold parameters that are no longer the model's
        self.model = self.model_wrapped = pruner.model
        self.optimizer, self.lr_scheduler = None, None

    @contextmanager
    def _keeping_the_masked_model(self, pruner: Pruner) -> Iterator[None]:
        """Where the smaller model isn't the masked one, the masked one is saved as it was trained."""
        try:
            yield
        except VerificationError:
            folder = Path(self.args.output_dir) / "masked-model"
            self.save_model(str(folder), _internal_call=True)
            if self.args.should_save:
                save_state(pruner.state_dict(), folder)
            raise

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
    """`Trainer`, and all that it takes, with pruning; `PruningMixin` says how it goes.

    Args:
        recipe: a `Recipe`, a mapping, or a path to YAML; None changes nothing at all.
        calibration_dataset: for criteria that look at data; else the first `calibration.samples` of the training set.
        teacher_model: for the recipe's `distillation`; without one it is a copy of the model.

    Raises:
        RecipeError: the recipe can't be accepted, or has no use for what was passed.
    """


class PruningSeq2SeqTrainer(PruningMixin, Seq2SeqTrainer):
    """`Seq2SeqTrainer`, and all that it takes, with pruning; `PruningMixin` says how it goes.

    Args:
        recipe: a `Recipe`, a mapping, or a path to YAML; None changes nothing at all.
        calibration_dataset: for criteria that look at data; else the first `calibration.samples` of the training set.
        teacher_model: for the recipe's `distillation`; without one it is a copy of the model.

    Raises:
        RecipeError: the recipe can't be accepted, or has no use for what was passed.
    """


class _PruneAtSteps(TrainerCallback):
    """Calls the trainer's pruner where Trainer has no method to extend."""

    def __init__(self, trainer: PruningMixin):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._begin_pruning()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._pruning_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._log_update()  # here, since only now the step is counted
