"""Pruning in a training loop: `step()` after `optimizer.step()`, `finish()` at the end."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_prune.apply import present
from hf_prune.apply.masks import MaskedTensor, enforce_, masked_tensors, masks_of
from hf_prune.calibration.batches import first_sample
from hf_prune.errors import RecipeError
from hf_prune.pipeline import apply_, finish_, verification_batches
from hf_prune.plan import KeepMasks, PruningPlan
from hf_prune.planning import Batches, RecipeLike, make_plan
from hf_prune.recipe import Recipe
from hf_prune.report import PruningReport
from hf_prune.report.build import measure_totals
from hf_prune.structure import inspect_model
from hf_prune.structure.sites import kind_of
from hf_prune.training.movement import Movement
from hf_prune.training.rewinding import Rewinding
from hf_prune.training.schedule import updates
from hf_prune.training.seeing import loss_on, what_left
from hf_prune.training.shrinking import Following, Pace, require_whole, resize_, wrap_again_
from hf_prune.training.state import require_same_recipe


logger = logging.getLogger(__name__)

# what names in a state begin with; those of masks with a step's number
_MOVEMENT, _REWIND = "movement|", "rewind|"


class Pruner:
    """Prunes a model while any loop trains it.

    ```python
    pruner = Pruner(model, optimizer, "recipe.yaml", n_steps=len(loader) * epochs, calibration=batches)
    for batch in loader:
        model(**batch).loss.backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
    report = pruner.finish()
    ```

    What is masked stays zero whatever the optimizer does: gradients of masked entries are zeroed as they arrive, so
    that clipping doesn't see them; moments when the mask changes; the entries themselves after every step. With an
    optimizer that Accelerate prepared, `step()` counts only where the optimizer stepped (gradient accumulation).

    With `schedule.shrink: when_final` the step that ends the schedule makes the model smaller, and verifies it; the optimizer's
    state is sliced along, and DistributedDataParallel, if `model` is one, made anew in place.

    Args:
        model: possibly wrapped for several processes.
        optimizer: over the model's parameters, possibly prepared by Accelerate. Criteria that score training (movement) read
            weights and gradients as its steps begin.
        recipe: a `Recipe`, a mapping, or a path to YAML.
        n_steps: optimizer steps of the whole training, of which the schedule's `begin` and `end` are fractions.
        calibration: keyword inputs of the model, or a function that gives them anew at every update.
        distills: whether the loop adds the recipe's `distillation` to its loss; the pruner never sees the loss.
        inputs: what `calibration` is, as the report says it: "calibration", "training" or "evaluation".
        is_shrunk: the model is as small already as the state says that is loaded next.

    Raises:
        RecipeError: the recipe can't be accepted.
    """

    def __new__(cls, model: nn.Module, *args: Any, **named: Any) -> Pruner:
        peft = sys.modules.get("peft")
        if cls is Pruner and peft is not None and isinstance(unwrap(model), peft.PeftModel):
            from hf_prune.training.adapters import AdaptedPruner

            cls = AdaptedPruner
        return super().__new__(cls)

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        recipe: RecipeLike,
        *,
        n_steps: int,
        calibration: Batches | Callable[[], Batches] | None = None,
        distills: bool = False,
        inputs: str = "calibration",
        is_shrunk: bool = False,
    ):
        self.model, self._wrapped = unwrap(model), model
        # Accelerate's wrapper, if it is one, holds torch's optimizer and knows whether a step is accumulating only
        self._accumulation = getattr(optimizer, "gradient_state", None)
        self.optimizer = getattr(optimizer, "optimizer", optimizer)
        self.recipe = Recipe.load(recipe)
        require_known_parameters(self.recipe)
        if self.recipe.distillation is not None and not distills:
            raise RecipeError(
                "the recipe's `distillation` changes the loss, which only PruningTrainer and PruningMixin compute; take one of "
                "them, or drop the section"
            )
        require_whole(model, self.recipe)
        self.calibration, self.inputs = calibration, inputs
        self.n_done = 0
        self.is_shrunk = is_shrunk
        self.report: PruningReport | None = None  # of what was shrunk in the middle of training
        self._pace = Pace()
        self.plan: PruningPlan | None = None
        self.updates = [updates(step.schedule or self.recipe.schedule, n_steps) for step in self.recipe.prune]
        self.last_update = max(max(of_step) for of_step in self.updates)
        self.seconds = 0.0
        self._obstacle: str | None = None  # why the model was not shrunk when the schedule ended
        self._sparsity: dict[str, float] | None = None  # counting takes time, and only updates change it
        self._seen: dict[str, float] = {}  # of the newest update
        self._hooks: list[RemovableHandle] = []
        self._structure = inspect_model(self.model)
        self._movement: Movement | None = None
        if not is_shrunk:
            self._movement = Movement(self.model, self._structure, self.recipe, self.optimizer)
        self._rewinding = Rewinding(self.recipe, n_steps, self.model)
        with torch.random.fork_rng(devices=[]):
            batches, _ = verification_batches(self.model, self._batches(), "", at_most=1)
            self._dense = measure_totals(self.model, first_sample(batches))
        self._watch_gradients()

    @property
    def is_final(self) -> bool:
        """Whether the schedule has ended: the masks won't change any more."""
        return self.is_shrunk or self.n_done >= self.last_update

    def step(self) -> bool:
        """Call after each `optimizer.step()`.

        Returns:
            Whether masks changed.

        Raises:
            RecipeError: the recipe can't be met on this model.
            CalibrationError: a criterion lacks the data or labels that it needs.
            UnsupportedModelError: the model has no unit of a target, with the reason.
            VerificationError: under `shrink: when_final` the smaller model differs from the masked one.
        """
        if self._accumulation is not None and not self._accumulation.sync_gradients:
            return False
        is_update = self._is_update()
        self.n_done += 1
        if not is_update:
            self._enforce()
            self._rewinding.look(self.n_done, self.model)
            self._pace.lap(time.perf_counter(), "shrunk" if self.is_shrunk else "masked")
            return False
        self._rewinding.look(self.n_done, self.model)
        started = time.perf_counter()
        enforce_(self.model)
        given, before = self._batches(), self.plan
        batches = None if given is None else list(given)
        losses = {"pruning/loss_before": loss_on(self.model, batches, self.recipe.seed)}
        self.plan = make_plan(
            self.model,
            self.recipe,
            calibration=batches,
            progress=[self._progress(of_step) for of_step in self.updates],
            previous=before,
            movement=self._movement.sums if self._movement else None,
        )
        apply_(self.model, self.plan)
        losses["pruning/loss_after"] = loss_on(self.model, batches, self.recipe.seed)
        if self._movement:
            self._movement.forget(masks_of(self.model))
        self._watch_gradients()
        self._zero_moments()
        if self.n_done == self.last_update:
            self._rewinding.rewind_(self.model, self.optimizer)
        seconds = time.perf_counter() - started
        self.seconds += seconds
        left = what_left(self._structure, before.masks if before else KeepMasks(), self.plan.masks)
        self._seen = {f"pruning/left/{kind}": float(left.get(kind, 0)) for kind in self._kinds()}
        self._seen |= {name: loss for name, loss in losses.items() if loss is not None} | {"pruning/seconds": seconds}
        if self.n_done == self.last_update and self.recipe.schedule.shrink == "when_final":
            self._shrink_on_the_way()
        self._pace.lap(time.perf_counter(), "masked", counts=False)
        return True

    def sparsity(self) -> dict[str, float]:
        """The fraction that has left, by kind (target, and part of layers), of what earlier steps left there."""
        if self._sparsity is None:
            if self.is_shrunk and self.report is not None:
                reached = self.report.content["sparsity"]
            else:
                reached = present.sparsity(self._structure, masks_of(self.model))
            self._sparsity = dict.fromkeys(self._kinds(), 0.0) | reached
        return self._sparsity

    def scalars(self) -> dict[str, float]:
        """What the newest update did, for loggers: `sparsity/…` by kind, what left in it, the loss around it, its seconds; empty
        before the first.
        """
        if not self._seen:
            return {}
        return {f"sparsity/{kind}": value for kind, value in self.sparsity().items()} | self._seen

    def finish(
        self, *, batches: Batches | None = None, inputs: str | None = None, verify: bool = True
    ) -> PruningReport:
        """Remove what is masked, verify, report. The optimizer holds the old parameters from then on.

        Before the schedule's end, the model is as sparse as it has become, and the report and a warning say so. What was shrunk in
        the middle of training is reported only.

        Args:
            batches: to verify on; the calibration data if not given.
            inputs: what the batches are: "calibration", "training" or "evaluation"; as at first if not given.
            verify: compare the smaller model with the masked one.

        Raises:
            VerificationError: they differ; the model is the masked one, as trained.
        """
        self.detach()
        if self.is_shrunk and self.report is not None:
            if pace := self._pace.measured():
                self.report.content["measured"]["step_seconds"] = pace
                self.report.attach_(self.model)
            return self.report
        plan = self.plan or PruningPlan(steps=[])
        if not self.is_final:
            early = f"training stopped at step {self.n_done}, before the schedule's end at {self.last_update}"
            plan = replace(plan, notes=[*plan.notes, f"{early}: the sparsity is not what the recipe asks for"])
            logger.warning(plan.notes[-1])
        if self.recipe.schedule.shrink == "when_final" and self.is_final and self._obstacle:
            plan = replace(plan, notes=[*plan.notes, self._obstacle])
        return self._finish(plan, batches, inputs or self.inputs, verify)

    def _finish(self, plan: PruningPlan, batches: Batches | None, inputs: str, verify: bool) -> PruningReport:
        with _in_its_own_precision(self.model):
            return finish_(
                self.model,
                self.recipe,
                plan=plan,
                batches=batches if batches is not None else self._batches(),
                inputs=inputs,
                shrink=self.recipe.schedule.shrink != "never",
                verify=verify,
                dense=self._dense,
                seconds={"plan": self.seconds},
            )

    def _shrink_on_the_way(self) -> None:
        assert self.plan is not None
        following = Following(self.model, self.optimizer)
        if obstacle := following.obstacle():
            self._obstacle = (
                f"shrunk when training ended, not when the schedule did: {obstacle}, which can't be sliced along"
            )
            logger.warning("the model will be %s", self._obstacle)
            return
        self.detach()
        with torch.random.fork_rng():
            self.report = self._finish(self.plan, self._batches(), self.inputs, True)
        following.follow_()
        wrap_again_(self._wrapped)
        self._structure, self.is_shrunk = inspect_model(self.model), True
        self._watch_gradients()

    def detach(self) -> None:
        """Take the hooks off the parameters and the optimizer; masks stay."""
        if self._movement:
            self._movement.detach()
        self._unwatch_gradients()

    # ----------------------------------------------------------------------------------------------------------
    # resuming

    def state_dict(self) -> dict[str, Any]:
        """Step, recipe and plan: its masks, the movement so far and the weights to rewind to in `tensors` by name, the rest plain data."""
        plan = self.plan
        sums = self._movement.sums if self._movement and not self.is_shrunk else {}
        movement = {f"{_MOVEMENT}{key}": s.to("cpu", copy=True) for key, s in sums.items()}
        rewind = {f"{_REWIND}{name}": tensor for name, tensor in self._rewinding.kept.items()}
        return {
            "n_done": self.n_done,
            "recipe": self.recipe.to_dict(),
            "plan": plan.to_dict() if plan else None,
            "shrunk": self.report.content if self.is_shrunk and self.report else None,
            "obstacle": self._obstacle,
            "step_seconds": self._pace.seconds,
            "tensors": (plan.mask_tensors() if plan else {}) | movement | rewind,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`: masks go back on the model, whose weights were loaded before.

        Where `state` is of a model that had been shrunk, this model is shrunk, and weights and the optimizer's state are loaded
        after.

        Args:
            state: from `state_dict`.

        Raises:
            CheckpointError: it is of another recipe; the message shows what differs.
        """
        require_same_recipe(state["recipe"], self.recipe)
        self.n_done = int(state["n_done"])
        self._pace.seconds |= state.get("step_seconds") or {}
        self._obstacle = state.get("obstacle")
        tensors = dict(state["tensors"])
        movement, rewind = (
            {name.removeprefix(kind): tensors.pop(name) for name in [*tensors] if name.startswith(kind)}
            for kind in (_MOVEMENT, _REWIND)
        )
        self._rewinding.load(rewind, self.model)
        if (shrunk := state.get("shrunk")) is not None:
            self._load_shrunk(PruningPlan.from_parts(state["plan"], tensors), PruningReport.from_dict(shrunk))
            return
        if self._movement:
            self._movement.load(movement)
        if state["plan"] is None:
            return
        # without its replacements: those are in the weights, which were trained since
        self.plan = PruningPlan.from_parts(state["plan"], tensors)
        apply_(self.model, self.plan)
        self._watch_gradients()

    def _load_shrunk(self, plan: PruningPlan, report: PruningReport) -> None:
        if not self.is_shrunk:
            self.detach()
            resize_(self.model, self.optimizer, plan)
            wrap_again_(self._wrapped)
        self.plan, self.report = plan, report
        self.is_shrunk, self._structure = True, inspect_model(self.model)
        report.attach_(self.model)
        self._watch_gradients()

    # ----------------------------------------------------------------------------------------------------------

    def _batches(self) -> Batches | None:
        return self.calibration() if callable(self.calibration) else self.calibration

    def _kinds(self) -> list[str]:
        """What the recipe's steps remove: targets, and parts of layers."""
        return [kind_of(step.target, step.part) for step in self.recipe.prune]

    def _is_update(self) -> bool:
        """Whether masks grow with the next step."""
        return not self.is_shrunk and any(self.n_done + 1 in of_step for of_step in self.updates)

    def _enforce(self) -> None:
        enforce_(self.model)

    def _progress(self, of_step: dict[int, float]) -> float:
        return max((progress for step, progress in of_step.items() if step <= self.n_done), default=0.0)

    def _by_parameter(self) -> dict[nn.Parameter, list[MaskedTensor]]:
        entries: dict[nn.Parameter, list[MaskedTensor]] = {}
        for entry, parameter in masked_tensors(self.model):
            entries.setdefault(parameter, []).append(entry)
        return entries

    def _unwatch_gradients(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _watch_gradients(self) -> None:
        self._unwatch_gradients()
        self._sparsity = None
        for parameter, entries in self._by_parameter().items():
            if parameter.requires_grad:
                self._hooks.append(parameter.register_post_accumulate_grad_hook(_masked_gradient(entries)))

    @torch.no_grad()
    def _zero_moments(self) -> None:
        for parameter, entries in self._by_parameter().items():
            for moment in self.optimizer.state.get(parameter, {}).values():
                if isinstance(moment, Tensor) and moment.shape == parameter.shape:
                    for entry in entries:
                        entry.zero_(moment)


def require_known_parameters(recipe: Recipe) -> None:
    """Refuse repairs that add parameters: the optimizer, its schedule and wrappers know those that were there.

    Raises:
        RecipeError: naming the step.
    """
    for number, step in enumerate(recipe.prune):
        if step.compensation.add:
            raise RecipeError(
                f"prune.{number}.compensation: add makes new biases, which the optimizer wouldn't train. Leave it out, or "
                "prune in one shot: prune_, or hf-prune run without the section training"
            )


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, `torch.compile` and the like."""
    return extract_model_from_parallel(model, keep_torch_compile=False)


@contextmanager
def _in_its_own_precision(model: nn.Module) -> Iterator[None]:
    """Without the autocast that Accelerate wraps round `forward`: what verification looks for would drown in rounding."""
    wrapped, original = model.__dict__.get("forward"), model.__dict__.get("_original_forward")
    if wrapped is None or original is None:
        yield
        return
    model.forward = original
    try:
        yield
    finally:
        model.forward = wrapped


def _masked_gradient(entries: list[MaskedTensor]) -> Callable[[Tensor], None]:
    # runs once a gradient is accumulated, before DistributedDataParallel takes it up: in place, no copy
    def hook(parameter: Tensor) -> None:
        if parameter.grad is not None:
            for entry in entries:
                entry.zero_(parameter.grad)

    return hook
