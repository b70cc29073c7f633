"""Distillation: what a frozen teacher adds to the loss of the model in training.

Axes: B samples, T positions, V classes or tokens, d entries of a hidden state.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from hf_prune.calibration.batches import IGNORED_LABEL, Batch, decoder_modules, is_encoder_decoder
from hf_prune.calibration.loss import predicts_next_token
from hf_prune.errors import CheckpointError, RecipeError
from hf_prune.plan import KeepMasks
from hf_prune.recipe.schema import Distillation
from hf_prune.structure import inspect_model


FILE = "pruning_teacher.safetensors"  # beside a checkpoint: a teacher that is a copy of the model at an earlier step


class Distiller:
    """A frozen teacher, and the loss with it (`distillation` in a recipe).

    (1 - weight) task + weight T² KL(teacher ‖ student) at temperature T (Hinton et al. 2015, arXiv 1503.02531, section 2; T²
    keeps the gradients' size whatever T is) + hidden_states × mean squared difference of the layers' outputs, layer by layer
    as long as the student has it. Each term is divided by what divides the task's loss: label tokens of the whole accumulated
    batch where the model's head takes their number, else those of this batch; samples where each has one label.

    Args:
        options: of the recipe.
        student: the model in training, not wrapped.
        teacher: another model with the same logits; it is frozen.
        skeleton: what the student's layers are found in where it is sharded; else they are in itself.

    Raises:
        RecipeError: the teacher doesn't fit the student.
    """

    def __init__(
        self, options: Distillation, student: nn.Module, teacher: nn.Module, skeleton: nn.Module | None = None
    ):
        if teacher is student:
            raise RecipeError("teacher_model is the model in training itself; give another one, or none for a copy")
        if any(hasattr(parameter, "ds_id") for parameter in teacher.parameters()):
            raise RecipeError(
                "teacher_model was loaded in parts, as Transformers loads every model once DeepSpeed's ZeRO-3 is configured, and "
                "nobody puts a teacher's together; load it before TrainingArguments are made"
            )
        self.options = options
        self.teacher = teacher.eval().requires_grad_(False)
        self.teacher.to(next(student.parameters()).device)
        self._shifts = predicts_next_token(student)
        self._stacks: list[_Stack] = []
        if options.hidden_states:
            self._stacks = _paired_stacks(student, teacher, skeleton or student)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, a pass of the student is remembered for the next `loss`."""
        with _recording(self._stacks, "student"):
            yield

    def loss(
        self,
        task: Tensor,
        outputs: Any,
        inputs: Mapping[str, Any],
        masks: KeepMasks,
        *,
        n_labels: Tensor | int | None = None,
        own_loss: bool = True,
        scale: float = 1.0,
    ) -> Tensor:
        """The loss to train by.

        Args:
            task: the task's own loss of this batch.
            outputs: of the student, for `inputs`, made inside `watching()`.
            inputs: keyword inputs with their labels.
            masks: which layers the student still has, of those that it began with.
            n_labels: of the whole accumulated batch, over all processes, if it is counted.
            own_loss: the model made the task's loss; else whoever did divided by `n_labels`.
            scale: what the task's loss was multiplied by after its division.

        Raises:
            RecipeError: these outputs can't be compared.
        """
        labels = self._labels(inputs)  # (B,) or (B, T)
        student = _logits(outputs, "the model in training")
        theirs = self._run_teacher(inputs)
        is_counted = labels != IGNORED_LABEL
        _require_comparable(student, labels)
        count: Tensor | int = is_counted.sum()
        if n_labels is not None:
            count = (
                task_divisor(task / scale, student[is_counted], labels[is_counted], n_labels) if own_loss else n_labels
            )
        options = self.options
        total = (1 - options.weight) * task
        if options.weight:
            teacher = _logits(theirs, "the teacher")
            _require_alike(student, teacher)
            divergence = soft_divergence(student[is_counted], teacher[is_counted], options.temperature)
            total = total + options.weight * scale * divergence / count
        if options.hidden_states:
            # a sample counts as often as it has labels
            shares = is_counted.reshape(len(labels), -1).sum(1)  # (B,)
            batch = Batch(0, dict(inputs), len(labels))
            difference = sum(stack.difference(batch, shares, masks) for stack in self._stacks) / len(self._stacks)
            total = total + options.hidden_states * scale * difference / count
        return total

    def _labels(self, inputs: Mapping[str, Any]) -> Tensor:
        """Where each position's own label is: a causal language model's are moved back by one, and the last has none."""
        if isinstance(inputs.get("shift_labels"), Tensor):
            return inputs["shift_labels"]
        labels = inputs.get("labels")
        if not isinstance(labels, Tensor) or labels.is_floating_point():
            raise RecipeError(
                f"distillation needs integer labels, one a sample or one a token; the batch has {sorted(inputs)}"
                f"{'' if labels is None else ', with labels that are no classes'}. Drop the section `distillation`."
            )
        return F.pad(labels, (0, 1), value=IGNORED_LABEL)[..., 1:] if self._shifts else labels

    @torch.no_grad()
    def _run_teacher(self, inputs: Mapping[str, Any]) -> Any:
        # an encoder-decoder may make its decoder's inputs from the labels
        left_out = {"num_items_in_batch", "shift_labels"} | (set() if is_encoder_decoder(self.teacher) else {"labels"})
        with _recording(self._stacks, "teacher"):
            return self.teacher(**{name: value for name, value in inputs.items() if name not in left_out})


def copy_of(model: nn.Module, directory: Path | None = None) -> nn.Module:
    """A teacher that is `model` as it is now, or as it was when `save_teacher` wrote it to `directory`.

    Raises:
        CheckpointError: it isn't there, or not this model's.
    """
    teacher = copy.deepcopy(model)
    if directory is not None:
        path = directory / FILE
        try:
            load_model(teacher, path)
        except (OSError, SafetensorError, RuntimeError) as error:
            raise CheckpointError(
                f"{path}, the teacher as it was when pruning began, can't be read: {error}. Resume from another checkpoint, or "
                "give teacher_model."
            ) from error
    return teacher


def save_teacher(teacher: nn.Module, directory: Path) -> None:
    """For `copy_of`."""
    save_model(teacher, str(directory / FILE))


def soft_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² Σ KL(softmax(teacher / T) ‖ softmax(student / T)) over rows: (n, V), (n, V) -> scalar, at least float32."""
    dtype = torch.promote_types(student.dtype, torch.float32)
    ours, theirs = (F.log_softmax(logits.to(dtype) / temperature, -1) for logits in (student, teacher))
    return temperature**2 * F.kl_div(ours, theirs, reduction="sum", log_target=True)


@torch.no_grad()
def task_divisor(task: Tensor, logits: Tensor, labels: Tensor, n_labels: Tensor | int) -> Tensor:
    """What the model divided its task loss by: the `n_labels` that the trainer counted, or the labels of this batch alone.

    Nothing on a model says which (of the heads in Transformers Llama's takes the trainer's number, BERT's and T5's don't), so
    the sum itself decides: (n, V), (n,) -> scalar.
    """
    n_here = torch.full_like(task, len(labels))
    n_counted = torch.as_tensor(n_labels, device=task.device).to(task.dtype)
    total = F.cross_entropy(logits.float(), labels.to(logits.device), reduction="sum")
    is_off = [((total / n).log() - task.float().log()).abs() for n in (n_counted, n_here)]
    return torch.where(is_off[0] < is_off[1], n_counted, n_here)


# --------------------------------------------------------------------------------------------------------------
# hidden states


class _Stack:
    """The layers of one stack in both models, and their outputs in order of their calls."""

    def __init__(self, key: str, n_layers: int, in_decoder: bool, student: list[nn.Module], teacher: list[nn.Module]):
        self.key, self.n_layers, self.in_decoder = key, n_layers, in_decoder
        self.blocks = {"student": student, "teacher": teacher}
        self.outputs: dict[str, list[Tensor]] = {"student": [], "teacher": []}

    def difference(self, batch: Batch, shares: Tensor, masks: KeepMasks) -> Tensor:
        """Σ over samples of share × mean over kept layers, positions that aren't padding, and entries, of (student - teacher)²."""
        keep = masks.units.get(self.key)
        kept = [*range(self.n_layers)] if keep is None else torch.nonzero(keep).reshape(-1).tolist()
        ours, theirs = self.outputs["student"], self.outputs["teacher"]
        if len(ours) == self.n_layers:
            ours = [ours[layer] for layer in kept]  # those that are masked are called too
        if len(ours) != len(kept) or len(theirs) != self.n_layers or ours[0].shape != theirs[0].shape:
            raise RecipeError(
                f"{self.key}: hidden states can't be compared: {len(ours)} of {len(kept)} layers of the model in training "
                f"were seen, {len(theirs)} of {self.n_layers} of the teacher, of shapes {[tuple(x.shape) for x in ours[:1]]} and "
                f"{[tuple(x.shape) for x in theirs[:1]]}. Write distillation.hidden_states: 0."
            )
        mask = batch.kept_mask(self.in_decoder)  # (B, T)
        total = ours[0].new_zeros((), dtype=torch.float32)
        for mine, layer in zip(ours, kept, strict=True):
            squared = (mine.float() - theirs[layer].float()).square().mean(-1)  # (B, T)
            if mask is not None and mask.shape == squared.shape:
                by_sample = (squared * mask).sum(1) / mask.sum(1).clamp(min=1)
            else:
                by_sample = squared.reshape(len(shares), -1).mean(1)
            total = total + (by_sample * shares).sum()
        return total / len(kept)


@contextmanager
def _recording(stacks: list[_Stack], of: str) -> Iterator[None]:
    """Remember the layers' outputs of one pass."""
    hooks = []
    for stack in stacks:
        outputs = stack.outputs[of] = []

        def record(module: nn.Module, args: Any, output: Any, outputs: list[Tensor] = outputs) -> None:
            outputs.append(output if isinstance(output, Tensor) else output[0])

        hooks += [block.register_forward_hook(record) for block in dict.fromkeys(stack.blocks[of])]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _paired_stacks(student: nn.Module, teacher: nn.Module, skeleton: nn.Module) -> list[_Stack]:
    ours, theirs = inspect_model(skeleton).of("layers"), inspect_model(teacher).of("layers")
    sizes = [{site.key: site.n_units for site in sites} for sites in (ours, theirs)]
    if not sizes[0] or sizes[0] != sizes[1]:
        raise RecipeError(
            f"distillation.hidden_states compares layer by layer, and the model in training has the layers {sizes[0]}, the "
            f"teacher {sizes[1]}. Give a teacher of the same layers, or write distillation.hidden_states: 0."
        )
    decoder = decoder_modules(student)
    stacks = []
    for site in ours:
        blocks = [[model.get_submodule(block) for block in site.blocks] for model in (student, teacher)]
        stacks.append(_Stack(site.key, site.n_units, id(blocks[0][0]) in decoder, *blocks))
    return stacks


# --------------------------------------------------------------------------------------------------------------
# logits


def _logits(outputs: Any, whose: str) -> Tensor:
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if not isinstance(logits, Tensor):
        raise RecipeError(
            f"distillation compares logits, and {whose} put out none ({type(outputs).__name__}). Take a model with a head of "
            "classes or tokens, or drop the section `distillation`."
        )
    return logits


def _require_alike(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise RecipeError(
            f"the teacher's logits are {tuple(teacher.shape)}, those of the model in training {tuple(student.shape)}; give a "
            "teacher_model with the same classes or the same vocabulary"
        )


def _require_comparable(student: Tensor, labels: Tensor) -> None:
    if student.shape[:-1] != labels.shape or student.shape[-1] < 2:
        raise RecipeError(
            f"distillation needs the logits of two or more classes for each label; logits are {tuple(student.shape)}, labels "
            f"{tuple(labels.shape)}. Drop the section `distillation`."
        )
