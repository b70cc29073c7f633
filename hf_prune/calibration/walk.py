"""One block on all batches, each paused where something behind is still to be decided.

To choose what a block's second matrix keeps, one needs its inputs with the first one pruned already. Running the block
anew for each of its matrices would cost two to three passes; here each batch's call is a coroutine that waits at the
matrix and goes on, with the weights as they are by then. What is in front runs once.

Where the hidden states are on disk, memory counts for more than time: nothing waits, and what is asked for is run anew.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Self

from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from hf_prune.calibration.blocks import Chain, Place, Stop, watch
from hf_prune.calibration.memory import give_back
from hf_prune.errors import UnsupportedModelError


class Walk(ABC):
    """The calls of one block of a chain, one a batch.

    A context manager: inside, `until` takes a batch on; `finish` all of them to the end, and the chain with them.
    `walk` makes one.
    """

    def __init__(self, chain: Chain, position: int, block: nn.Module):
        self._chain, self._position, self._block = chain, position, block

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        return None

    @abstractmethod
    def until(self, number: int, places: Sequence[Place]) -> dict[Place, Tensor]:
        """Take batch `number` on until it has passed all of `places`; the tensors that passed there.

        Raises:
            UnsupportedModelError: it came to its end before.
        """

    @abstractmethod
    def finish(self) -> None:
        """Take all batches to the block's end; its outputs become the chain's hidden states."""

    def _run(self, number: int) -> Tensor:
        """The block's output for batch `number`."""
        return self._chain.calls[number][self._position](self._block, self._chain.hidden[number])

    def _not_reached(self, place: Place, number: int) -> UnsupportedModelError:
        name, side = place
        return UnsupportedModelError(
            f"{self._chain.blocks[self._position]}: the {side} of {name or 'the block'} isn't reached in batch {number} of "
            "the calibration data"
        )


def walk(chain: Chain, position: int, block: nn.Module, places: Iterable[Place]) -> Walk:
    """Of a block, a walk that fits where the chain's hidden states are.

    Args:
        chain: its hidden states at `position` are the inputs.
        position: of the block in the chain.
        block: the module to run, possibly a changed copy.
        places: what will be asked for, each as often as it will be.
    """
    return _Anew(chain, position, block) if chain.hidden.is_on_disk else _Paused(chain, position, block, places)


GIVE_BACK_EVERY = 16  # calls that go on: what they let go of lies between what those that wait hold


class _Paused(Walk):
    """Held meanwhile: of each batch what its call has alive where it waits, and what passed a place that is asked for later."""

    def __init__(self, chain: Chain, position: int, block: nn.Module, places: Iterable[Place]):
        super().__init__(chain, position, block)
        self._uses = Counter(places)
        self._left = [self._uses.copy() for _ in chain.calls]
        self._seen: list[dict[Place, Tensor]] = [{} for _ in chain.calls]
        self._runs = [greenlet(self._to_the_end) for _ in chain.calls]

    def __enter__(self) -> Self:
        self._handles = [watch(self._block, place, self._pause) for place in self._uses]
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()
        for run in self._runs:
            run.throw()  # lets go of what an unfinished call holds

    def until(self, number: int, places: Sequence[Place]) -> dict[Place, Tensor]:
        run, seen, left = self._runs[number], self._seen[number], self._left[number]
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
        for number, run in enumerate(self._runs):
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
        return True

    def _to_the_end(self, number: int) -> None:
        self._chain.hidden[number] = self._run(number)

    def _pause(self, place: Place, tensor: Tensor) -> None:
        current = getcurrent()
        if current in self._runs:  # not a call by somebody else
            current.parent.switch((place, tensor))


class _Anew(Walk):
    """Nothing is held: each batch runs from the start whenever something is asked for, and no further."""

    def until(self, number: int, places: Sequence[Place]) -> dict[Place, Tensor]:
        seen: dict[Place, Tensor] = {}

        def note(place: Place, tensor: Tensor) -> None:
            seen[place] = tensor
            if len(seen) == len(set(places)):
                raise Stop

        handles = [watch(self._block, place, note) for place in dict.fromkeys(places)]
        try:
            self._run(number)
        except Stop:
            return seen
        finally:
            for handle in handles:
                handle.remove()
        raise self._not_reached(next(place for place in places if place not in seen), number)

    def finish(self) -> None:
        self._chain.run_(self._position, self._block)
