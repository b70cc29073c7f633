"""Where a projection's output joins the residual stream: found by looking at the numbers, not at names.

Axes: B samples, T positions, d_model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_prune.calibration.blocks import BlockCall, Place, first_tensor


@dataclass(frozen=True)
class Junction:
    """A projection y = W a + b of a block, and the sum s = r + y that the block goes on with.

    `total` is where s is seen, `rest` where r is seen before the projection runs; both None where y isn't simply added
    (it is normed or scaled first, or added to what is computed later): then s is y itself.
    """

    projection: str
    total: Place | None = None
    rest: Place | None = None

    @property
    def target(self) -> Place:
        """Where to read s."""
        return self.total or (self.projection, "output")

    @property
    def sources(self) -> list[Place]:
        """Where to read a, and r if there is one."""
        return [(self.projection, "input")] + ([self.rest] if self.rest else [])


@torch.no_grad()
def find_junctions(block: nn.Module, call: BlockCall, hidden: Tensor, projections: list[str]) -> list[Junction]:
    """The junctions of `projections`, in the order in which the block runs them.

    Args:
        block: in evaluation mode.
        call, hidden: one call of it.
        projections: names of linear layers inside the block.
    """
    passed: list[tuple[Place, Tensor]] = []  # in the order in which they come by

    def entering(name: str):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if args or "hidden_states" in kwargs:
                value = BlockCall.of(args, kwargs)[0]
                if isinstance(value, Tensor):
                    passed.append(((name, "input"), value))

        return hook

    def leaving(name: str):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, args: tuple, output: object) -> None:
            if isinstance(output, Tensor) or (isinstance(output, tuple) and output and isinstance(output[0], Tensor)):
                passed.append(((name, "output"), first_tensor(output)))

        return hook

    handles = []
    for name, module in block.named_modules():
        handles += [
            module.register_forward_pre_hook(entering(name), with_kwargs=True),
            module.register_forward_hook(leaving(name)),
        ]
    try:
        call(block, hidden)
    finally:
        for handle in handles:
            handle.remove()
    places = [place for place, _ in passed]
    ran = sorted(
        (name for name in projections if (name, "output") in places), key=lambda n: places.index((n, "output"))
    )
    return [_junction(name, passed, places) for name in ran]


def _junction(name: str, passed: list[tuple[Place, Tensor]], places: list[Place]) -> Junction:
    starts, ends = places.index((name, "input")), places.index((name, "output"))
    y = passed[ends][1]
    for total, s in passed[ends + 1 :]:
        if s.shape != y.shape:
            continue
        scale = s.abs().max()
        rest = s - y
        if rest.abs().max() <= 1e-6 * scale:
            continue  # y itself, handed on
        for place, r in passed[:starts]:
            if r.shape == y.shape and (rest - r).abs().max() <= _close(y.dtype) * scale:
                return Junction(name, total, place)
    return Junction(name)


def _close(dtype: torch.dtype) -> float:
    return {torch.float64: 1e-9, torch.float32: 1e-5}.get(dtype, 2e-2)
