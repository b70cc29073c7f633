"""DeepSpeed's ZeRO, stages 1 to 3: masks on its float32 masters and its partitions too.

A process updates a run of the entries of a flattened parameter, its fragment, in float32: ZeRO-1 and 2 then give all processes the
whole parameter again, ZeRO-3 gathers it where it is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.apply.masks import MaskedTensor
from hf_prune.errors import RecipeError
from hf_prune.training.sharding import ShardedPruner


class ZeroPruner(ShardedPruner):
    """`ShardedPruner` of what a DeepSpeed engine trains; arguments and errors are its.

    Raises:
        RecipeError: the engine trains without ZeRO (stage 0).
    """

    def __init__(self, model: nn.Module, optimizer: Any, recipe: Any, **named: Any):
        for parameter in model.parameters():
            if parameter.requires_grad and not hasattr(parameter, "ds_id") and not hasattr(parameter, "_hp_mapping"):
                raise RecipeError(
                    "DeepSpeed without ZeRO keeps masters where masks don't reach them; set zero_optimization.stage to 1, 2 or "
                    "3, or train without DeepSpeed"
                )
        self._fragments: list[_Fragment] = []
        super().__init__(model, optimizer, recipe, **named)

    def _watch_gradients(self) -> None:
        if self.model is not self._parts:
            return
        self._unwatch_gradients()
        self._sparsity = None
        self._fragments = []
        for parameter, entries in self._by_parameter().items():
            self._fragments.append(_Fragment.of(parameter, entries))
            if parameter.requires_grad:
                # before it is accumulated: once it is, DeepSpeed's own hook, which was there first, takes it away
                self._hooks.append(parameter.register_hook(_without(entries)))

    @torch.no_grad()
    def _enforce(self) -> None:
        for fragment in self._fragments:
            fragment.zero_()

    @torch.no_grad()
    def _zero_moments(self) -> None:
        if self.model is not self._parts:
            return
        optimizer: Any = self.optimizer
        for fragment in self._fragments:
            fragment.zero_moments_(optimizer.optimizer)

    def _full(self, name: str) -> Tensor:
        parameter = self._parts.get_parameter(name)
        if not hasattr(parameter, "ds_id"):
            return parameter.detach().clone()
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter]):
            return parameter.detach().clone()

    @torch.no_grad()
    def _put(self, name: str, whole: Tensor) -> None:
        parameter = self._parts.get_parameter(name)
        _Fragment.of(parameter, []).take_(whole)


@dataclass
class _Fragment:
    """What of a parameter this process updates, and what of it stays."""

    parameter: nn.Parameter
    entries: list[MaskedTensor]
    start: int  # among the entries of the flattened parameter
    length: int  # 0 where the parameter is another process's
    keep: Tensor  # bool, (length,)

    @classmethod
    def of(cls, parameter: Any, entries: list[MaskedTensor]) -> _Fragment:
        is_partitioned = hasattr(parameter, "ds_id")
        shape = parameter.ds_shape if is_partitioned else parameter.shape
        if is_partitioned:
            length = parameter.ds_tensor.numel()
            start = parameter.ds_zero_partition_rank * length
        else:
            address = parameter._hp_mapping and parameter._hp_mapping.lp_fragment_address
            start, length = (address.start, address.numel) if address else (0, 0)
        keep = torch.ones(shape, dtype=torch.bool, device=parameter.device)
        for entry in entries:
            entry.zero_(keep)
        return cls(parameter, entries, start, length, _run(keep, start, length))

    def zero_(self) -> None:
        """Zero what has left in the float32 master, and wherever the weight is that the forward pass reads."""
        parameter: Any = self.parameter
        if _is_there(parameter):
            for entry in self.entries:
                entry.zero_(parameter)
        if hasattr(parameter, "ds_id"):
            parameter.ds_tensor.masked_fill_(~self.keep, 0)
        for master in self._master():
            master.masked_fill_(~self.keep, 0)

    def zero_moments_(self, optimizer: torch.optim.Optimizer) -> None:
        """Zero what has left in torch's own optimizer, of flat groups, that DeepSpeed drives."""
        for moment in self._moments(optimizer):
            moment.masked_fill_(~self.keep, 0)

    def take_(self, whole: Tensor) -> None:
        """Let the parameter be `whole`."""
        parameter: Any = self.parameter
        if _is_there(parameter):
            parameter.copy_(whole)
        if hasattr(parameter, "ds_id"):
            parameter.ds_tensor.copy_(_run(whole, self.start, self.length))
        for master in self._master():
            master.copy_(_run(whole, self.start, self.length))

    # what is done to a yielded tensor is kept; under ZeRO-3 it is a copy where the optimizer is offloaded

    def _master(self) -> Iterator[Tensor]:
        parameter: Any = self.parameter
        if hasattr(parameter, "ds_id"):
            from deepspeed.utils import safe_get_local_fp32_param, safe_set_local_fp32_param

            master = safe_get_local_fp32_param(parameter)
            if master is not None:
                yield master
                safe_set_local_fp32_param(parameter, master)
        elif self.length:
            yield parameter._hp_mapping.get_hp_fragment()

    def _moments(self, optimizer: Any) -> Iterator[Tensor]:
        parameter: Any = self.parameter
        if hasattr(parameter, "ds_id"):
            from deepspeed.utils import safe_get_local_optimizer_state, safe_set_local_optimizer_state

            states = optimizer.state.values() if parameter.requires_grad else ()
            names = {key for state in states for key, value in state.items() if _is_moment(value)}
            for name in sorted(names):
                moment = safe_get_local_optimizer_state(parameter, name)
                yield moment
                safe_set_local_optimizer_state(parameter, moment, name)
        elif self.length:
            # not by get_optim_state_fragment: DeepSpeed 0.19 knows those of the first group only
            mapping = parameter._hp_mapping
            (flat,) = optimizer.param_groups[mapping.param_group_index]["params"]
            for moment in filter(_is_moment, optimizer.state[flat].values()):
                yield moment.narrow(0, mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel)


def _is_there(parameter: Any) -> bool:
    """Whether the whole weight is: always, but under ZeRO-3, for parameters that are too small to be partitioned."""
    return not hasattr(parameter, "ds_id") or parameter.numel() == parameter.ds_numel


def _is_moment(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() > 1


def _run(whole: Tensor, start: int, length: int) -> Tensor:
    """Of the flattened tensor (length,) from `start`; the last partition is filled up with ones."""
    run = whole.reshape(-1)[start : start + length]
    return torch.cat([run, run.new_ones(length - len(run))])


def _without(entries: list[MaskedTensor]) -> Any:
    def hook(gradient: Tensor) -> Tensor:
        masked = gradient.clone()
        for entry in entries:
            entry.zero_(masked)
        return masked

    return hook
