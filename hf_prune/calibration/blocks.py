"""A stack of blocks run one at a time on stored hidden states: what goes into block k + 1 is what came out of block k.

So each block can be changed on the outputs of those changed before it, at the price of a few passes over the stack and
the memory of one block beside the hidden states. Where a model does something between its blocks, it is no chain.

Axes: B samples, T positions, d_model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import Cache

from hf_prune.calibration.batches import Batch, decoder_modules
from hf_prune.calibration.shelf import Interned, Shelf, States, taken
from hf_prune.errors import UnsupportedModelError


Place = tuple[str, str]  # (module inside a block, "input" or "output"); "" is the block itself


class Stop(Exception):
    """The forward pass has come as far as it is needed."""


@dataclass
class BlockCall:
    """What a block is called with beside the hidden states: masks, position embeddings, the encoder's output. Its tensors may
    be on a shelf."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    by_name: bool

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, BlockCall]:
        """The hidden states of a call, and the rest of it without a cache."""
        args, rest = without_cache(args), without_cache(kwargs)
        if "hidden_states" in rest:
            return rest.pop("hidden_states"), cls(args, rest, by_name=True)
        return args[0], cls(args[1:], rest, by_name=False)

    def is_like(self, other: BlockCall) -> bool:
        """Whether both hand on the same objects, or equal numbers and words."""
        mine, theirs = (
            [*call.args, *call.kwargs.values(), *call.kwargs, len(call.args), call.by_name] for call in (self, other)
        )
        return len(mine) == len(theirs) and all(
            a is b or (isinstance(a, (bool, int, float, str)) and a == b) for a, b in zip(mine, theirs, strict=True)
        )

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """(B, T, d_model) -> (B, T, d_model)."""
        args, kwargs = taken(self.args), taken(self.kwargs)
        if self.by_name:
            return first_tensor(block(*args, hidden_states=hidden, **kwargs))
        return first_tensor(block(hidden, *args, **kwargs))


@dataclass
class Chain:
    """A stack's calls, recorded: the hidden states that go into it, and each block's other arguments, by batch."""

    name: str
    blocks: tuple[str, ...]  # in call order; a shared block is there several times
    batches: list[Batch]
    hidden: States
    calls: list[list[BlockCall]]  # by batch, then by position
    in_decoder: bool
    n_outputs: int | None = None  # of a block that returns a tuple

    def fork(self) -> Chain:
        """The same calls from the same hidden states, to be taken another way."""
        return replace(self, hidden=self.hidden.copy())

    @torch.no_grad()
    def run_(self, position: int, block: nn.Module) -> None:
        """Take the hidden states of all batches through one block."""
        for number, calls in enumerate(self.calls):
            self.hidden[number] = calls[position](block, self.hidden[number])

    def tokens(self, number: int, x: Tensor) -> Tensor:
        """(B, T, d) of batch `number` -> (n_tokens, d) without padding."""
        return self.batches[number].tokens(x, self.in_decoder)


@torch.no_grad()
def record_chain(
    model: nn.Module,
    name: str,
    blocks: Sequence[str],
    batches: Sequence[Batch],
    replaced: Mapping[str, States],
    shelf: Shelf | None = None,
) -> Chain:
    """Run `model` up to the end of a stack and record how its blocks are called.

    Args:
        model: in evaluation mode.
        name: of the stack.
        blocks: names in call order.
        batches: on the model's device.
        replaced: for a stack that was run before (an encoder), by its last block: its new outputs, by batch.
        shelf: for the hidden states and the blocks' other arguments; in memory if None.

    Raises:
        UnsupportedModelError: the model does something between the blocks.
    """
    modules = {block: model.get_submodule(block) for block in dict.fromkeys(blocks)}
    decoder = decoder_modules(model)
    shelf = shelf or Shelf()
    in_decoder = any(id(block) in decoder for block in modules.values())
    chain = Chain(name, tuple(blocks), list(batches), shelf.states(), [], in_decoder)
    interned = Interned(shelf)
    are_alike = False  # all blocks are called with the same: once that is seen, the first call of a batch says it all
    for number, batch in enumerate(batches):
        calls: list[BlockCall] = []
        previous: list[Tensor] = []
        interned.next_batch()

        def enter(
            module: nn.Module,
            args: Any,
            kwargs: Any,
            calls: Any = calls,
            previous: Any = previous,
            first_says_it: bool = are_alike,
        ) -> None:
            hidden, call = BlockCall.of(args, kwargs)
            if not calls:
                chain.hidden.append(hidden)
            elif hidden is not previous[-1] and not torch.equal(hidden, previous[-1]):
                raise UnsupportedModelError(f"{name}: the model changes what passes between its blocks")
            calls.append(replace(call, args=interned.put(call.args), kwargs=interned.put(call.kwargs)))
            if first_says_it:
                raise Stop

        def leave(module: nn.Module, args: Any, output: Any, calls: Any = calls, previous: Any = previous) -> None:
            previous[:] = [first_tensor(output)]
            chain.n_outputs = None if isinstance(output, Tensor) else len(output)
            if len(calls) == len(blocks):
                raise Stop

        handles = [module.register_forward_pre_hook(enter, with_kwargs=True) for module in modules.values()]
        handles += [module.register_forward_hook(leave) for module in modules.values()]
        for last, outputs in replaced.items():
            handles.append(model.get_submodule(last).register_forward_hook(_answering(outputs[number])))
        try:
            model(**batch.inputs)
        except Stop:
            pass
        finally:
            for handle in handles:
                handle.remove()
        if are_alike:
            calls *= len(blocks)
        if len(calls) != len(blocks):
            raise UnsupportedModelError(f"{name}: {len(calls)} of its {len(blocks)} blocks are called")
        chain.calls.append(calls)
        are_alike = all(call.is_like(calls[0]) for call in calls)
    return chain


@contextmanager
def answering(model: nn.Module, chain: Chain, hidden: Tensor) -> Iterator[None]:
    """Inside, running `model` runs no block of the chain: the stack's output is `hidden`."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return hidden if chain.n_outputs is None else (hidden, *[None] * (chain.n_outputs - 1))

    modules = [model.get_submodule(block) for block in dict.fromkeys(chain.blocks)]
    before = [module.__dict__.get("forward") for module in modules]  # Accelerate puts one there
    for module in modules:
        module.forward = forward
    try:
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            if own is None:
                del module.forward
            else:
                module.forward = own


def scratch_copy(block: nn.Module) -> nn.Module:
    """A copy of a block to try things on; without the hooks of the original."""
    copied = copy.deepcopy(block)
    for module in copied.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return copied


def without_cache(values: Any) -> Any:
    """Arguments without their cache of keys, which would grow each time that what takes it is run again."""
    if isinstance(values, Mapping):
        return {name: None if isinstance(value, Cache) else value for name, value in values.items()}
    return tuple(None if isinstance(value, Cache) else value for value in values)


def first_tensor(value: Any) -> Tensor:
    """The hidden states of an output, which come first."""
    return value if isinstance(value, Tensor) else value[0]


@contextmanager
def recorded(block: nn.Module, places: Sequence[Place]) -> Iterator[dict[Place, Tensor]]:
    """What passes `places` while the block runs as a whole. An input is the very tensor: what shares one is told by that, and a block
    that goes on in place changes it.
    """
    seen: dict[Place, Tensor] = {}
    handles = [watch(block, place, seen.__setitem__) for place in dict.fromkeys(places)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def watch(block: nn.Module, place: Place, note: Callable[[Place, Tensor], None]) -> RemovableHandle:
    """Call `note` with the tensor that passes `place`, whenever one does."""
    name, side = place
    module = block.get_submodule(name)
    if side == "input":
        return module.register_forward_pre_hook(
            lambda module, args, kwargs: note(place, BlockCall.of(args, kwargs)[0]), with_kwargs=True
        )
    # a copy: what comes out may be added to in place (Falcon's parallel branches)
    return module.register_forward_hook(lambda module, args, output: note(place, first_tensor(output).clone()))


def _answering(hidden: Tensor) -> Any:
    """A hook that puts `hidden` in place of what a block computed."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        return hidden if isinstance(output, Tensor) else type(output)((hidden, *output[1:]))

    return hook
