"""Repair: block by block, refit what is left so that the residual stream comes back to that of the dense model.

Each block sees the outputs of the pruned and repaired blocks before it. The target of a projection's refit is the sum
that the dense model has at the same place, so that a refit makes up for its own block's loss and for what those before
it left over: Σ |s - r - W a|², s the dense sum, r and a of the pruned model. For a run of dropped layers s is the dense
model's after the run, as in ReplaceMe (Shopkhoev et al. 2025), where a linear map on the projection's output is
fitted; here it is the whole projection, of which that map is a special case, and the checkpoint keeps its shape as well.

Where the recipe asks for it, what is left of each block then learns what a linear fit can't reach (`reconstruct.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.apply.present import dropped_modules, kept_entries
from hf_prune.calibration.batches import dealt, turns
from hf_prune.calibration.blocks import Chain, record_chain, recorded
from hf_prune.calibration.collect import evaluation
from hf_prune.calibration.memory import give_back
from hf_prune.calibration.reduction import as_first_rank
from hf_prune.calibration.residual import Junction, find_junctions
from hf_prune.calibration.shelf import States, open_shelf
from hf_prune.calibration.walk import Walk
from hf_prune.compensation.least_squares import is_test
from hf_prune.errors import CalibrationError, RecipeError, UnsupportedModelError
from hf_prune.plan import KeepMasks
from hf_prune.planning.minibatches import WholeBatches, mean_error
from hf_prune.planning.projection import refit_projection_
from hf_prune.planning.reconstruct import Reconstruction, learning_parameters, reconstruct_
from hf_prune.planning.scratch import Linear, masked_copy, masked_within, narrowed, require_in_stacks, wanted_of
from hf_prune.recipe.fields import Compensation
from hf_prune.structure import ModelStructure, WeightSite, stacks_of


ROUNDING = 1e-6  # a smaller relative squared error of a block is none


@dataclass
class Wanted:
    """What the recipe's steps ask to be refitted."""

    projections: set[str] = field(default_factory=set)  # by name: output projections that lost inputs
    biases: set[str] = field(default_factory=set)  # of which the bias alone
    adding: set[str] = field(default_factory=set)  # of both, those that get a bias where they have none
    before_runs: bool = False  # the projection before each run of dropped layers
    after_drops: bool = False  # every output projection of the blocks behind the first dropped one
    after_parts: bool = False  # every one behind the first dropped part, and beside it in its block
    reconstruction: Reconstruction | None = None  # of each block from the first that lost something
    learning: set[str] = field(
        default_factory=set
    )  # keys and parameters of the steps that asked for it: whose stacks learn

    def add(self, structure: ModelStructure, target: str, compensation: Compensation, masks: KeepMasks) -> None:
        """What one step asks for, given what it removes. Of several reconstructions the longest counts."""
        if compensation.name == "reconstruct":
            how = Reconstruction(compensation.epochs, compensation.learning_rate)
            self.reconstruction = max(self.reconstruction or how, how)
            self.learning |= masks.units.keys() | masks.weights.keys()
        if any(structure[key].branches for key in masks.units):
            self.after_parts = True
            return
        if target == "layers":
            self.before_runs = True
            self.after_drops |= compensation.name != "linear"
            return
        for key, keep in masks.units.items():
            if not keep.all():
                reads = {read.module for read in structure[key].reads}
                (self.biases if compensation.name == "bias" else self.projections).update(reads)
                if compensation.add:
                    self.adding |= reads


@dataclass
class Repaired:
    """What `repair` found: new weights and biases by parameter name, of the parameters' own shapes and dtypes."""

    values: dict[str, Tensor] = field(default_factory=dict)
    added: list[str] = field(default_factory=list)  # of these, the biases that the model has not
    ridges: list[float | None] = field(default_factory=list)  # by projection; None where a change made it worse
    n_tokens: set[int] = field(default_factory=set)
    errors: list[tuple[float, float]] = field(default_factory=list)  # relative, of a block before and after it learned
    notes: list[str] = field(default_factory=list)

    def said(self) -> list[str]:
        """How many projections were refitted and on what, and how many blocks learned how much."""
        return [
            *self.notes,
            *([self._refitted()] if self.ridges else []),
            *([self._learned()] if self.errors else []),
        ]

    def _refitted(self) -> str:
        ridges = [ridge for ridge in self.ridges if ridge is not None]
        between = f", ridge {min(ridges):g} to {max(ridges):g} times each input's mean square" if ridges else ""
        kept = len(self.ridges) - len(ridges)
        left = f"; {kept} left as they were, where no change did better on the part held out" if kept else ""
        tokens = " to ".join(dict.fromkeys(str(n) for n in (min(self.n_tokens), max(self.n_tokens))))
        new = f"; {len(self.added)} of them got a bias" if self.added else ""
        return f"{len(ridges)} output projections were refitted on {tokens} tokens{between}{left}{new}"

    def _learned(self) -> str:
        before, after = (sum(each) / len(self.errors) for each in zip(*self.errors, strict=True))
        kept = sum(first == second for first, second in self.errors)
        left = f"; {kept} were left as they were, since they came no nearer" if kept else ""
        return (
            f"{len(self.errors) - kept} of {len(self.errors)} blocks learned what the dense model's put out: the mean relative "
            f"squared error of a block's output went from {before:.4g} to {after:.4g}{left}"
        )


def repair(
    model: nn.Module,
    structure: ModelStructure,
    masks: KeepMasks,
    wanted: Wanted,
    batches: Sequence[Mapping[str, Any]],
    *,
    replacements: Mapping[str, Tensor] | None = None,
    offload: str = "none",
    seed: int = 0,
) -> Repaired:
    """Refit output projections; the model is left as it is.

    Args:
        model: as it was before pruning; it is left so.
        structure: of the model.
        masks: everything that leaves.
        wanted: which projections to refit.
        batches: calibration; every process passes the same.
        replacements: the new values that earlier steps gave, by parameter name: what is refitted starts from them.
        offload: where what passes between blocks is kept: "none" (in memory) or "disk".
        seed: of a private random state.

    Raises:
        CalibrationError: no data, or numbers that are not finite.
        RecipeError: a projection can't be refitted: it is outside a stack of blocks, or has no bias to take the change.
        UnsupportedModelError: the blocks are no chain.
    """
    mine = list(dealt(batches, next(model.parameters()).device))
    order = turns(batches, next(model.parameters()).device)
    stacks = stacks_of(model)
    learning = {name for name in wanted.learning if name in masks.weights}
    require_in_stacks(wanted.projections | wanted.biases | learning, stacks, "compensation")
    found = Repaired()
    passes = {
        name: _StackRepair(
            model, structure, masks, wanted, replacements or {}, name, blocks, len(batches), order, seed, found
        )
        for name, blocks in stacks.items()
    }
    replaced: dict[str, States] = {}
    with evaluation(model, seed), torch.no_grad(), open_shelf(offload) as shelf:
        while any(pass_.has_work for pass_ in passes.values()):
            name = next(iter(passes))
            pass_ = passes.pop(name)
            if not (pass_.has_work or pass_.loses or replaced):
                continue
            # a stack without work runs too, where one behind it reads what it lost
            current = record_chain(model, name, stacks[name], mine, replaced, shelf)
            dense = record_chain(model, name, stacks[name], mine, {}, shelf) if replaced else current.fork()
            pass_.run(dense, current)
            replaced[stacks[name][-1]] = current.hidden
    return found


class _StackRepair:
    """One pass over one stack."""

    def __init__(
        self,
        model: nn.Module,
        structure: ModelStructure,
        masks: KeepMasks,
        wanted: Wanted,
        replacements: Mapping[str, Tensor],
        name: str,
        blocks: tuple[str, ...],
        n_batches: int,
        order: Sequence[tuple[int, int]],
        seed: int,
        found: Repaired,
    ):
        self.model, self.structure, self.masks, self.wanted, self.blocks = model, structure, masks, wanted, blocks
        self.replacements, self.n_batches, self.found = replacements, n_batches, found
        self.order, self.seed = order, seed
        keep = masks.units.get(f"layers:{name}")
        self.kept = [True] * len(blocks) if keep is None else keep.tolist()
        behind = self.kept.index(False) + 1 if wanted.after_drops and False in self.kept else len(blocks)
        parts = [module for module in dropped_modules(structure, masks) if module not in blocks]
        if wanted.after_parts:
            lossy = [n for n, block in enumerate(blocks) if any(part.startswith(f"{block}.") for part in parts)]
            behind = min([behind, *lossy])
        self.behind = behind
        gone = tuple(f"{part}." for part in parts)
        reads = [
            read.module for site in structure.sites for read in site.reads if not f"{read.module}.".startswith(gone)
        ]
        self.work = [
            self._projections(position, [read for read in reads if read.startswith(f"{block}.")], behind)
            for position, block in enumerate(blocks)
        ]
        self.loses = any(not keep.all() for key, keep in masks.units.items() if self._is_mine(name, key)) or any(
            parameter.startswith(f"{name}.") for parameter in (*masks.weights, *replacements)
        )
        learns = any(
            self._is_mine(name, key) if key in masks.units else key.startswith(f"{name}.") for key in wanted.learning
        )
        self.how = wanted.reconstruction if learns else None
        self.has_work = any(self.work) or (self.loses and self.how is not None)
        if wanted.before_runs and not self.kept[0] and self.how is None:
            n_first = self.kept.index(True)
            found.notes.append(
                f"{name}: nothing makes up for the first {n_first} layers, since no projection comes before them"
            )
        if self.has_work and len(set(blocks)) < len(blocks):
            raise RecipeError(
                f"compensation can't refit {name}, whose block is called {len(blocks)} times: its weights are one"
            )

    def _is_mine(self, name: str, key: str) -> bool:
        site = self.structure[key]
        return site.name == name or any(piece.module.startswith(f"{name}.") for piece in site.slices)

    def _projections(self, position: int, reads: Sequence[str], behind: int) -> list[str]:
        """Which of a block's output projections to refit, by their names in the model: from block `behind` on all."""
        if not self.kept[position]:
            return []
        if position >= behind or (
            self.wanted.before_runs and position + 1 < len(self.kept) and not self.kept[position + 1]
        ):
            return list(reads)
        return [read for read in reads if read in self.wanted.projections | self.wanted.biases]

    def run(self, dense: Chain, current: Chain) -> None:
        """Take both chains through the stack, the current one through its pruned and repaired blocks."""
        for position, block in enumerate(self.blocks):
            if not self.kept[position]:
                if not any(self.kept[:position]):  # a dropped beginning: no block before it can make up for it
                    dense.run_(position, self.model.get_submodule(block))
                continue
            scratch = masked_copy(self.model, self.structure, self.masks, block, self.replacements)
            last = position
            while last + 1 < len(self.blocks) and not self.kept[last + 1]:
                last += 1
            junctions = self._junctions(position, dense, runs=last > position)
            targets = self._advance(dense, position, last, junctions)
            start = current.fork() if self.how else None
            self._refit_in_turn(scratch, junctions, targets, current, position)
            if self.how and start:
                del targets
                self._reconstruct(self.how, scratch, start, dense.hidden, current, position)
                del start

    def _refit_in_turn(
        self,
        scratch: nn.Module,
        junctions: Sequence[Junction],
        targets: Mapping[Junction, States],
        current: Chain,
        position: int,
    ) -> None:
        """Refit a block's projections and take `current` through it."""
        block = self.blocks[position]
        sources = [place for junction in junctions for place in junction.sources]
        with Walk(current, position, scratch, sources) as going:
            for junction in junctions:
                new = self._refit(scratch, junction, targets[junction], current, position, going)
                for tensor, values in new.items():
                    lasting = current.hidden.shelf.outlasting(values)
                    self.found.values[f"{block}.{junction.projection}.{tensor}"] = lasting
            going.finish()
        give_back()  # what waited in the block

    def _reconstruct(
        self, how: Reconstruction, scratch: nn.Module, start: Chain, wanted: States, current: Chain, position: int
    ) -> None:
        """Train `scratch` from the hidden states of `start` on; `current` has those that the refits alone lead to.

        Unless it comes nearer to what is `wanted` the block stays as it was refitted.
        """
        block = self.blocks[position]
        before = mean_error(current, wanted)
        if not math.isfinite(before):
            raise CalibrationError(
                f"what comes out of {block} is not finite on the calibration data. Look for broken samples, or load the model "
                "in bfloat16 or float32."
            )
        masked = masked_within(scratch, self.structure, self.masks, block)
        gone = {entry.name for entry, _ in masked if entry.is_whole}
        inside = self._learning_modules(position)
        names = [
            name
            for name in learning_parameters(self.model, block, scratch)
            if f"{block}.{name}".startswith(inside) and f"{block}.{name}" not in gone
        ]
        if before < ROUNDING or not names:
            return
        whole = WholeBatches(scratch, start, position, wanted, self.order)
        narrow = narrowed(scratch, self.structure, self.masks, block)
        reconstruct_(scratch, names, whole, how, narrow, self.seed + position)
        start.run_(position, scratch)
        after = mean_error(start, wanted)
        give_back()
        if not after < before:
            self.found.errors.append((before, before))
            return
        self.found.errors.append((before, after))
        current.hidden = start.hidden
        for name in names:
            values = scratch.get_parameter(name).detach().cpu()
            self.found.values[f"{block}.{name}"] = current.hidden.shelf.outlasting(values)

    def _learning_modules(self, position: int) -> tuple[str, ...]:
        """How the names of a block's parameters that learn begin: those of the sites that lost units; all where none did, where
        single weights left, and where layers or parts left behind it or before.
        """
        block = f"{self.blocks[position]}."
        lossy = (self.structure[key] for key, keep in self.masks.units.items() if not keep.all())
        modules = {f"{piece.module}." for site in lossy for piece in site.slices if piece.module.startswith(block)}
        before_gap = position + 1 < len(self.kept) and not self.kept[position + 1]
        everything = (
            before_gap or position >= self.behind or any(name.startswith(block) for name in self.masks.weights)
        )
        return (block,) if everything or not modules else tuple(sorted(modules))

    def _junctions(self, position: int, dense: Chain, runs: bool) -> list[Junction]:
        block, work = self.blocks[position], self.work[position]
        if not work:
            return []
        names = [name[len(block) + 1 :] for name in work]
        live = self.model.get_submodule(block)
        junctions = as_first_rank(lambda: find_junctions(live, dense.calls[0][position], dense.hidden[0], names))
        reaches_end = any(junction.total == ("", "output") for junction in junctions)
        if runs and not (reaches_end or self.how):
            raise UnsupportedModelError(
                f"{block}: its output is no plain sum with an output projection (its blocks end in a norm), so that no "
                "projection can make up for the layers dropped behind it. Use compensation reconstruct for layers, or none."
            )
        if runs and not self.wanted.after_drops:
            wanted = self.wanted.projections | self.wanted.biases
            junctions = [j for j in junctions if j.total == ("", "output") or f"{block}.{j.projection}" in wanted]
        return junctions

    def _advance(
        self,
        dense: Chain,
        first: int,
        last: int,
        junctions: Sequence[Junction],
    ) -> dict[Junction, States]:
        """Take the dense model's hidden states through blocks `first` to `last`; what each junction should sum to."""
        targets = {junction: dense.hidden.like() for junction in junctions}
        places = [junction.target for junction in junctions]
        for number, calls in enumerate(dense.calls):
            live = self.model.get_submodule(self.blocks[first])
            with recorded(live, places) as seen:
                hidden = calls[first](live, dense.hidden[number])
            for position in range(first + 1, last + 1):
                hidden = calls[position](self.model.get_submodule(self.blocks[position]), hidden)
            dense.hidden[number] = hidden
            for junction in junctions:
                at_end = junction.target == ("", "output")
                targets[junction].append(hidden if at_end else seen[junction.target])
        return targets

    def _refit(
        self,
        scratch: nn.Module,
        junction: Junction,
        targets: States,
        current: Chain,
        position: int,
        going: Walk,
    ) -> dict[str, Tensor]:
        """Refit one projection of `scratch`, in place; its new tensors by name."""
        name = f"{self.blocks[position]}.{junction.projection}"
        module = scratch.get_submodule(junction.projection)
        only_bias = name in self.wanted.biases and name not in self.wanted.projections
        linear = Linear.of(module)
        is_transposed = linear.matrix is not linear.weight
        # removed inputs keep theirs, removed weights stay out
        site = WeightSite(f"{name}.weight", name, tuple(linear.weight.shape), reduction_dim=0 if is_transposed else 1)
        there = kept_entries(self.structure, self.masks, site).to(linear.weight.device)
        wide = torch.promote_types(linear.weight.dtype, torch.float32)

        def rows() -> Iterator[tuple[bool, Tensor, Tensor]]:
            for number, batch in enumerate(current.batches):
                seen = going.until(number, junction.sources)
                inputs = current.tokens(number, seen[junction.projection, "input"]).to(wide)
                outputs = wanted_of(current, number, junction, seen, targets[number], wide)
                yield is_test(batch.index, self.n_batches), inputs, outputs

        there = there.T if is_transposed else there
        may_add = name in self.wanted.adding
        done = refit_projection_(name, module, there, rows(), only_bias=only_bias, may_add=may_add)
        self.found.ridges.append(done.ridge)
        self.found.n_tokens.add(done.n_tokens)
        if done.has_new_bias:
            self.found.added.append(f"{name}.bias")
        return done.values
