"""Sites: what can leave a model, and what leaves together.

Axes: d_model, d_ff, d_head, n_heads, n_kv_heads, d_in, d_out; a count is n_*.

A *unit* is the smallest thing kept or removed: a feed-forward neuron, an attention head (under grouped-query
attention a key/value head with all its query heads), a layer, an expert. A *site* is a set of units that compete with each
other and the tensors that shrink with them. Names are qualified module names in the model that was inspected.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor


Target = Literal["weights", "ffn_neurons", "attention_heads", "layers", "experts"]
UNIT_TARGETS: tuple[Target, ...] = ("ffn_neurons", "attention_heads", "layers", "experts")
Part = Literal["block", "attention", "feed_forward"]


def kind_of(target: str, part: str = "block") -> str:
    """What units are, in one word: their target, and of a layer's part which: `layers.attention`."""
    return target if part == "block" else f"{target}.{part}"


@dataclass(frozen=True, slots=True)
class Span:
    """`n_units` consecutive pieces of `width` entries each, from `start`: piece u belongs to unit u."""

    start: int
    width: int


@dataclass(frozen=True, slots=True)
class TensorSlice:
    """The entries of one tensor that belong to the units of a site, along one dimension.

    A fused projection has several spans: `[q | k | v]` three, the per-head interleaved order of GPT-NeoX one.
    `writes` is True where the units are produced (rows of the input projections) and False where they are read
    (columns of the output projection).
    """

    module: str
    tensor: str
    dim: int
    spans: tuple[Span, ...]
    writes: bool

    @property
    def name(self) -> str:
        """The qualified tensor name, as in `model.named_parameters()`."""
        return f"{self.module}.{self.tensor}" if self.module else self.tensor

    def index(self, units: Tensor) -> Tensor:
        """Entries along `dim` that belong to `units` (int64, n) -> (int64, n * sum of widths), ascending per span."""
        pieces = [
            (span.start + units[:, None] * span.width + torch.arange(span.width, device=units.device)).reshape(-1)
            for span in self.spans
        ]
        return torch.cat(pieces)

    @property
    def entries_per_unit(self) -> int:
        """How many entries along `dim` one unit holds."""
        return sum(span.width for span in self.spans)


@dataclass(frozen=True, slots=True)
class Attribute:
    """A plain number on a module that counts units: it becomes `per_unit * n_kept`.

    With `of_config`, the number is a field of `module.config` that the module reads in its forward pass. A limit
    (experts a token) only becomes smaller where it is more than what is left.
    """

    module: str
    name: str
    per_unit: int
    of_config: bool = False
    is_limit: bool = False


@dataclass(frozen=True, slots=True)
class FullWidthNorm:
    """An RMS norm over all units at once; exact after removal if folded: w' = w sqrt(N/K), eps' = eps N/K.

    (K kept of N entries: the masked norm averages their squares over N, the sliced one over K.)
    """

    module: str
    epsilon: str


@dataclass(frozen=True, slots=True)
class Read:
    """Where units are read: the last dimension of this module's input, laid out as `span`."""

    module: str
    span: Span


@dataclass(frozen=True, slots=True)
class Branch:
    """One block's part: what it adds to the residual stream becomes zero when its `parameters` do.

    `modules` are what holds them and leaves: the attention or feed-forward itself, or its projections where the block
    holds those; `outputs` are the projections that write last, of each attention or feed-forward of the block.
    """

    block: str
    modules: tuple[str, ...]
    outputs: tuple[str, ...]
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class Site:
    """Units of one kind that compete with each other, and everything that leaves with them."""

    name: str
    target: Target
    n_units: int
    slices: tuple[TensorSlice, ...] = ()
    attributes: tuple[Attribute, ...] = ()
    norms: tuple[FullWidthNorm, ...] = ()
    reads: tuple[Read, ...] = ()
    # target `layers` only: the blocks in call order (one name repeated where a block is shared)
    blocks: tuple[str, ...] = ()
    # of those the ones that have to stay, by number, each with the reason
    fixed: tuple[tuple[int, str], ...] = ()
    # whether others are told by their places: then what leaves is stepped over, and those behind it don't move up
    in_place: bool = False
    # parts of layers only: what leaves with each unit, in the order of their blocks; a block may have no such part
    part: Part = "block"
    branches: tuple[Branch, ...] = ()
    # in stacked experts only: the module that holds them, and of target `experts` its router and slices of buffers
    holder: str = ""
    router: str = ""
    buffers: tuple[TensorSlice, ...] = ()
    # a router that ranks its experts by groups compares the best two
    n_least: int = 1

    @property
    def kind(self) -> str:
        """See `kind_of`."""
        return kind_of(self.target, self.part)

    @property
    def key(self) -> str:
        """Unique in a model: the same module may hold heads and be a layer."""
        return f"{self.kind}:{self.name}"

    @property
    def numbers(self) -> tuple[int, ...]:
        """What recipes and reports call the units: of a block's part, the number of its block."""
        return tuple(self.blocks.index(branch.block) for branch in self.branches) or tuple(range(self.n_units))

    @property
    def places(self) -> tuple[str, ...]:
        """The modules that read the units, or hold them whole."""
        return tuple(read.module for read in self.reads) or ((self.holder,) if self.holder else ())

    @property
    def can_leave(self) -> Tensor:
        """False for the units that are fixed: bool, (n_units,)."""
        mask = torch.ones(self.n_units, dtype=torch.bool)
        mask[[number for number, _ in self.fixed]] = False
        return mask

    @property
    def is_shared(self) -> bool:
        """True where one block is called several times (ALBERT): only the number of calls can change."""
        return len(set(self.blocks)) < len(self.blocks)


@dataclass(frozen=True, slots=True)
class WeightSite:
    """A matrix whose single entries may be zeroed. `reduction_dim` is the axis that a product sums over.

    Of a convolution, (d_out, d_in, …), that is `d_in` and all after it.
    """

    name: str
    module: str
    shape: tuple[int, ...]
    reduction_dim: int

    @property
    def d_in(self) -> int:
        """How many products each output sums."""
        return math.prod(self.shape) // self.shape[1 - self.reduction_dim]

    @property
    def is_matrix(self) -> bool:
        """Whether its inputs can be looked at as rows of `d_in` entries."""
        return len(self.shape) == 2

    @property
    def key(self) -> str:
        return f"weights:{self.name}"


@dataclass(frozen=True, slots=True)
class Refusal:
    """Something found that can't be pruned soundly for `target`, and why."""

    target: Target
    name: str
    reason: str
    part: Part = "block"

    @property
    def kind(self) -> str:
        """See `kind_of`."""
        return kind_of(self.target, self.part)


def _never() -> None:
    return None


@dataclass(frozen=True)
class ModelStructure:
    """What `inspect_model` found: sites, weights, refusals, and sizes of the model they were found in."""

    model_class: str
    model_type: str
    sites: tuple[Site, ...]
    weights: tuple[WeightSite, ...]
    refusals: tuple[Refusal, ...]
    n_parameters: int
    # runs the model, so it waits until it is asked: MACs and the shapes of the inputs, or None where none can be made up
    count_macs: Callable[[], tuple[int, dict[str, list[int]]] | None] = field(
        repr=False, compare=False, default=_never
    )

    def of(self, target: Target, part: Part = "block") -> tuple[Site, ...]:
        """The sites of a unit target, or of a part of its blocks, in the model's order."""
        return tuple(site for site in self.sites if (site.target, site.part) == (target, part))

    @cached_property
    def macs(self) -> int | None:
        """MACs of one made-up sample, see `macs_of`; None where no inputs can be made up."""
        return self._counted[0] if self._counted else None

    @cached_property
    def macs_of(self) -> dict[str, list[int]]:
        """Shapes of the inputs that `macs` was counted on."""
        return self._counted[1] if self._counted else {}

    @cached_property
    def _counted(self) -> tuple[int, dict[str, list[int]]] | None:
        return self.count_macs()

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __getitem__(self, key: str) -> Site:
        for site in self.sites:
            if site.key == key:
                return site
        raise KeyError(key)

    def __str__(self) -> str:
        # The table is drawn elsewhere; imported late because a terminal is not needed to prune.
        from hf_prune.structure.table import structure_table

        return structure_table(self)
