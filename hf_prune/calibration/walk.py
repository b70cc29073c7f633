"""One block on all batches, each paused where something behind is still to be decided.

To choose what a block's second matrix keeps, one needs its inputs with the first one pruned already. Running the block
anew for each of its matrices would cost two to three passes; here each batch's call is a coroutine that waits at the
matrix and goes on, with the weights as they are by then. What is in front runs once.

Where the hidden states are on disk, memory counts for more than time: nothing waits, and what is asked for is run anew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from hf_prune.calibration.blocks import Chain, Place, Stop, watch
from hf_prune.errors import UnsupportedModelError


class Walk:
    """The calls of one block of a chain, one a batch.

    A context manager: inside, `until` takes a batch on; `finish` all of them to the end, and the chain with them. Held
    meanwhile: of each batch what its call has alive where it waits, and what passed a place that is asked for later.

    Args:
        chain: its hidden states at `position` are the inputs.
        position: of the block in the chain.
        block: the module to run, possibly a changed copy.
        places: what will be asked for, each as often as it will be.
    """

    def __init__(self, chain: Chain, position: int, block: nn.Module, places: Iterable[Place]):
        self._chain, self._position, self._block = chain, position, block
        uses = Counter(places)
        self._left = [uses.copy() for _ in chain.calls]
        self._seen: list[dict[Place, Tensor]] = [{} for _ in chain.calls]
        self._runs = {greenlet(self._run): number for number in range(len(chain.calls))}
        self._by_number = list(self._runs)

    def __enter__(self) -> Walk:
        if self._chain.hidden.is_on_disk:
            self._handles = []
            return self
        self._handles = [watch(self._block, place, self._pause) for place in self._left[0]] if self._left else []
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()
        for run in self._by_number:
            run.throw()  # lets go of what an unfinished call holds

    def until(self, number: int, places: Sequence[Place]) -> dict[Place, Tensor]:
        """Take batch `number` on until it has passed all of `places`; the tensors that passed there.

        Raises:
            UnsupportedModelError: it came to its end before.
        """
        if self._chain.hidden.is_on_disk:
            return self._anew(number, places)
        run, seen, left = self._by_number[number], self._seen[number], self._left[number]
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
        if self._chain.hidden.is_on_disk:
            self._chain.run_(self._position, self._block)
            return
        for number, run in enumerate(self._by_number):
            while not run.dead:
                self._resume(run, number)

    def _anew(self, number: int, places: Sequence[Place]) -> dict[Place, Tensor]:
        """Run batch `number` from the start until it has passed all of `places`, and no further."""
        seen: dict[Place, Tensor] = {}

        def note(place: Place, tensor: Tensor) -> None:
            seen[place] = tensor
            if len(seen) == len(set(places)):
                raise Stop

        handles = [watch(self._block, place, note) for place in dict.fromkeys(places)]
        try:
            self._chain.calls[number][self._position](self._block, self._chain.hidden[number])
        except Stop:
            return seen
        finally:
            for handle in handles:
                handle.remove()
        raise self._not_reached(next(place for place in places if place not in seen), number)

    def _not_reached(self, place: Place, number: int) -> UnsupportedModelError:
        name, side = place
        return UnsupportedModelError(
            f"{self._chain.blocks[self._position]}: the {side} of {name or 'the block'} isn't reached in batch {number} of "
            "the calibration data"
        )

    def _resume(self, run: greenlet, number: int) -> bool:
        """To the next place (True), or to the end."""
        passed = run.switch(number)
        if passed is None:
            return False
        place, tensor = passed
        if self._left[number][place]:
            self._seen[number][place] = tensor
        return True

    def _run(self, number: int) -> None:
        chain, position = self._chain, self._position
        chain.hidden[number] = chain.calls[number][position](self._block, chain.hidden[number])

    def _pause(self, place: Place, tensor: Tensor) -> None:
        current = getcurrent()
        if current in self._runs:  # not a call by somebody else
            current.parent.switch((place, tensor))
