"""One block on all batches, each paused where something behind is still to be decided.

To choose what a block's second matrix keeps, one needs its inputs with the first one pruned already. Running the block
anew for each of its matrices would cost two to three passes; here each batch's call is a coroutine that waits at the
matrix and goes on, with the weights as they are by then. What is in front runs once.

Where the hidden states are on disk, the activations that a waiting call holds wait there too.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, Self

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, UntypedStorage, nn

from hf_prune.calibration.blocks import Chain, Place, watch
from hf_prune.calibration.memory import give_back
from hf_prune.calibration.shelf import OnDisk
from hf_prune.errors import UnsupportedModelError


GIVE_BACK_EVERY = 16  # calls that go on: what they let go of lies between what those that wait hold


class Walk:
    """The calls of one block of a chain, one a batch.

    A context manager: inside, `until` takes a batch on; `finish` all of them to the end, and the chain with them.
    Held meanwhile: of each batch what its call has alive where it waits, and what passed a place that is asked for later.

    Args:
        chain: its hidden states at `position` are the inputs.
        position: of the block in the chain.
        block: the module to run, possibly a changed copy.
        places: what will be asked for, each as often as it will be.
    """

    def __init__(self, chain: Chain, position: int, block: nn.Module, places: Iterable[Place]):
        self._chain, self._position, self._block = chain, position, block
        self._uses = Counter(places)
        self._left = [self._uses.copy() for _ in chain.calls]
        self._seen: list[dict[Place, Tensor]] = [{} for _ in chain.calls]
        self._runs = [greenlet(self._to_the_end) for _ in chain.calls]
        self._asleep = _Asleep(chain, block) if chain.hidden.shelf.is_on_disk else None

    def __enter__(self) -> Self:
        self._hooks = ExitStack()
        if self._asleep:
            for handle in self._asleep.attach():
                self._hooks.callback(handle.remove)
        for place in self._uses:
            self._hooks.callback(watch(self._block, place, self._pause).remove)
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.close()
        for run in self._runs:
            run.throw()  # lets go of what an unfinished call holds

    def until(self, number: int, places: Sequence[Place]) -> dict[Place, Tensor]:
        """Take batch `number` on until it has passed all of `places`; the tensors that passed there, until the next is asked.

        Raises:
            UnsupportedModelError: it came to its end before.
        """
        run, seen, left = self._runs[number], self._seen[number], self._left[number]
        if self._asleep:
            self._asleep.wake(number)
        while missing := [place for place in places if place not in seen]:
            if run.dead or not self._resume(run, number):
                raise self._not_reached(missing[0], number)
        passed = {place: seen[place] for place in places}
        for place in passed:
            left[place] -= 1
            if not left[place]:
                del seen[place]
        return passed

    def finish(self) -> None:
        """Take all batches to the block's end; its outputs become the chain's hidden states."""
        for number, run in enumerate(self._runs):
            if self._asleep:
                self._asleep.wake(number)
            while not run.dead:
                self._resume(run, number)

    def _resume(self, run: greenlet, number: int) -> bool:
        """To the next place (True), or to the end."""
        passed = run.switch(number)
        if number % GIVE_BACK_EVERY == GIVE_BACK_EVERY - 1:
            give_back()
        if passed is None:
            return False
        place, tensor = passed
        if self._left[number][place]:
            self._seen[number][place] = tensor
            if self._asleep:
                self._asleep.note(tensor)
        return True

    def _to_the_end(self, number: int) -> None:
        call = self._chain.calls[number][self._position]
        self._chain.hidden[number] = call(self._block, self._chain.hidden[number])

    def _pause(self, place: Place, tensor: Tensor) -> None:
        current = getcurrent()
        if current in self._runs:  # not a call by somebody else
            current.parent.switch((place, tensor))

    def _not_reached(self, place: Place, number: int) -> UnsupportedModelError:
        name, side = place
        return UnsupportedModelError(
            f"{self._chain.blocks[self._position]}: the {side} of {name or 'the block'} isn't reached in batch {number} of "
            "the calibration data"
        )


class _Asleep:
    """Activations on the chain's shelf while the call that holds them waits: what passed in or out of a module, is alive, and has
    a row for each position as the hidden states have, so that it is no other call's.

    One batch's are in memory at a time. A tensor stays what it is for the call: its storage is emptied and filled again.
    """

    def __init__(self, chain: Chain, block: nn.Module):
        self._block, self._shelf = block, chain.hidden.shelf
        self._rows = [chain.hidden[number].shape[:-1] for number in range(len(chain.calls))]
        self._noted: list[list[weakref.ref[Tensor]]] = [[] for _ in chain.calls]
        # of the batch that is awake, what is on the shelf as well
        self._away: list[list[_Held]] = [[] for _ in chain.calls]
        self._awake = 0
        self._weights = {tensor.untyped_storage()._cdata for tensor in (*block.parameters(), *block.buffers())}

    def attach(self) -> Iterator[Any]:
        """Hooks that note what passes."""
        for module in self._block.modules():
            yield module.register_forward_pre_hook(
                lambda module, args, kwargs: self.note(*args, *kwargs.values()), with_kwargs=True
            )
            yield module.register_forward_hook(
                lambda module, args, output: self.note(*output if isinstance(output, tuple) else (output,))
            )

    def note(self, *values: Any) -> None:
        """Tensors of the batch that is awake."""
        rows = self._rows[self._awake]
        self._noted[self._awake] += [
            weakref.ref(value) for value in values if isinstance(value, Tensor) and value.shape[:-1] == rows
        ]

    def wake(self, number: int) -> None:
        """Bring back what batch `number` holds, and put away what the one before does."""
        if number == self._awake:
            return
        self._put_away(self._awake)
        self._awake = number
        for held in self._away[number]:
            kept = held.there.load()
            held.storage.resize_(len(kept))
            _bytes_of(held.storage).copy_(kept)

    def _put_away(self, number: int) -> None:
        alive = {id(tensor): tensor for each in self._noted[number] if (tensor := each()) is not None}
        self._noted[number] = [weakref.ref(tensor) for tensor in alive.values()]
        before = {held.storage._cdata: held for held in self._away[number]}
        now: dict[int, _Held] = {}
        for tensor in alive.values():
            storage, version = tensor.untyped_storage(), tensor._version
            key = storage._cdata
            if key in now or key in self._weights or not storage.resizable():  # a mapped file is on disk already
                continue
            if key in before and before[key].version == version:
                now[key] = before[key]  # written once, and not changed since
            else:
                there = self._shelf.put(_bytes_of(storage))
                assert isinstance(there, OnDisk)
                now[key] = _Held(storage, version, there)
            storage.resize_(0)
        self._away[number] = list(now.values())


class _Held(NamedTuple):
    """A storage that is empty while its bytes are on a shelf; `version` of the tensor counts changes in place."""

    storage: UntypedStorage
    version: int
    there: OnDisk


def _bytes_of(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
