"""Where a projection's output joins the residual stream: found by looking at the numbers, not at names.

Axes: B samples, T positions, d_model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_prune.calibration.blocks import BlockCall, Place, first_tensor
from hf_prune.structure.naming import is_linear


@dataclass(frozen=True)
class Junction:
    """A projection y = W a + b of a block, or another module with its output y, and the sum s = r + y that the block goes on with.

    `total` is where s is seen; r is what is seen at `rests`, added up, before the projection runs. None and empty where y
    isn't simply added (it is normed or scaled first, or added to what is computed later): then s is y itself.
    """

    projection: str
    total: Place | None = None
    rests: tuple[Place, ...] = ()

    @property
    def target(self) -> Place:
        """Where to read s."""
        return self.total or (self.projection, "output")

    @property
    def sources(self) -> list[Place]:
        """Where to read a, and r if there is one."""
        return [(self.projection, "input"), *self.rests]

    def rest(self, seen: Mapping[Place, Tensor]) -> Tensor | None:
        """r, from what was seen at `sources`, (B * T, d_model); None where there is none."""
        rows = [_rows(seen[place]) for place in self.rests]
        return sum(rows[1:], rows[0]) if rows else None


@torch.no_grad()
def find_junctions(block: nn.Module, call: BlockCall, hidden: Tensor, projections: list[str]) -> list[Junction]:
    """The junctions of `projections`, in the order in which the block runs them.

    Args:
        block: in evaluation mode.
        call, hidden: one call of it.
        projections: names of linear layers inside the block.
    """
    passed = _passing(block, call, hidden)
    places = [place for place, _ in passed]
    ran = sorted(
        (name for name in projections if (name, "output") in places), key=lambda n: places.index((n, "output"))
    )
    return [_junction(name, passed, places) for name in ran]


@torch.no_grad()
def find_branches(block: nn.Module, call: BlockCall, hidden: Tensor, projections: list[str]) -> dict[str, Junction]:
    """Of each projection that ends a branch, the junction of what the branch adds: itself, or a module behind it that
    norms or scales its output. Those for which none is found are left out.

    Args:
        block, call, hidden: as for `find_junctions`.
        projections: names of linear layers inside the block.
    """
    passed = _passing(block, call, hidden)
    places = [place for place, _ in passed]
    found = {}
    for name in projections:
        for end in _ends(name, passed) if (name, "output") in places else ():
            junction = _junction(end, passed, places)
            if junction.total is not None:
                found[name] = junction
                break
    for name, module in block.named_modules():
        # parallel branches join at once, where the last of them has run
        if is_linear(module) and (name, "output") in places:
            junction = _junction(name, passed, places)
            for other, _ in junction.rests[1:]:
                if other in projections and other not in found:
                    found[other] = Junction(other, junction.total)
    return found


@torch.no_grad()
def find_tokenwise(block: nn.Module, call: BlockCall, hidden: Tensor, name: str) -> Junction | None:
    """The junction of the module `name` at the block's end, if it sees each token by itself and takes in nothing else.

    Args:
        block, call, hidden: as for `find_junctions`.
        name: of a module inside the block.
    """
    module = block.get_submodule(name)
    calls: list[tuple[Tensor, Tensor] | None] = []

    def hook(module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        alone = len(args) + len(kwargs) == 1 and (args or "hidden_states" in kwargs)
        x = BlockCall.of(args, kwargs)[0] if alone else None
        # copies, since a block may go on in place
        calls.append((x.clone(), first_tensor(output).clone()) if isinstance(x, Tensor) else None)

    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        passed = _passing(block, call, hidden)
    finally:
        handle.remove()
    if len(calls) != 1 or calls[0] is None:
        return None
    junction = _junction(name, passed, [place for place, _ in passed])
    return junction if junction.total == ("", "output") and _is_tokenwise(module, *calls[0]) else None


def _is_tokenwise(module: nn.Module, x: Tensor, y: Tensor) -> bool:
    """Whether `module` puts out the same where each token is a sample of its own."""
    if x.dim() > 2 and x.shape[-2] == 1:
        return False  # which a single token doesn't tell
    x, y = _rows(x), _rows(y)
    try:
        alone = _rows(first_tensor(module(x[:, None])))
    except (RuntimeError, ValueError, TypeError, IndexError):  # it takes no such shape
        return False
    tolerance = 5e-2 if y.dtype.itemsize == 2 else 1e-3
    return alone.shape == y.shape and bool(((alone - y).norm(dim=1) <= tolerance * y.norm(dim=1)).all())


def _ends(name: str, passed: list[tuple[Place, Tensor]]) -> Iterator[str]:
    """`name`, then the module that takes its output in, then the one that takes in that one's."""
    yield name
    values = dict(reversed(passed))  # of each place the first
    y, n = values[name, "output"], [place for place, _ in passed].index((name, "output"))
    for (other, side), x in passed[n + 1 :]:
        is_next = side == "input" and x.shape == y.shape and torch.equal(x, y) and (other, "output") in values
        if is_next and not torch.equal(values[other, "output"], y):
            yield other
            y = values[other, "output"]


def _passing(block: nn.Module, call: BlockCall, hidden: Tensor) -> list[tuple[Place, Tensor]]:
    """What goes into and comes out of all modules of a block, in the order in which it comes by."""
    passed: list[tuple[Place, Tensor]] = []

    def kept(value: Tensor) -> Tensor:
        """A copy, since a block may go on in place; nothing of what is no hidden state."""
        is_hidden = value.shape[-1:] == hidden.shape[-1:] and value.numel() == hidden.numel()
        return value.clone() if is_hidden else hidden.new_empty(0, 1)

    def entering(name: str):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if args or "hidden_states" in kwargs:
                value = BlockCall.of(args, kwargs)[0]
                if isinstance(value, Tensor):
                    passed.append(((name, "input"), kept(value)))

        return hook

    def leaving(name: str):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, args: tuple, output: object) -> None:
            if isinstance(output, Tensor) or (isinstance(output, tuple) and output and isinstance(output[0], Tensor)):
                passed.append(((name, "output"), kept(first_tensor(output))))

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
    return passed


def _junction(name: str, passed: list[tuple[Place, Tensor]], places: list[Place]) -> Junction:
    starts, ends = places.index((name, "input")), places.index((name, "output"))
    passed = [(place, _rows(x)) for place, x in passed]  # OPT goes on with rows: (B * T, d_model)
    y = passed[ends][1]
    if not y.numel():
        return Junction(name)
    before = [(place, r) for place, r in passed[:starts] if r.shape == y.shape]
    for total, s in passed[ends + 1 :]:
        if s.shape != y.shape:
            continue
        rest, size = s - y, s.abs() + y.abs()
        if _is_rounding(rest, size):
            continue  # y itself, handed on
        at_end = passed[-1][1].shape == s.shape and torch.equal(passed[-1][1], s)
        total = passed[-1][0] if at_end else total  # a part may hand on what the block ends with
        for place, r in before:
            if _is_rounding(rest - r, size + r.abs()):
                return Junction(name, total, (place,))
        if before and before[0][0] == ("", "input"):  # of parallel branches the last joins all of them at once
            rest, size = rest - before[0][1], size + before[0][1].abs()
            for place, r in before[1:]:
                if _is_rounding(rest - r, size + r.abs()):
                    return Junction(name, total, (before[0][0], place))
    return Junction(name)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _is_rounding(difference: Tensor, size: Tensor) -> bool:
    """Whether it is small beside the terms entry by entry: some entries of a state are thousands of times larger than the others."""
    close = {torch.float64: 1e-9, torch.float32: 1e-5}.get(size.dtype, 2e-2)
    return bool((difference.abs() <= close * size).all())
