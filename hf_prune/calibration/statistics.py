"""What a pass over the calibration data leaves behind, and which tensors a site holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from hf_prune.structure.sites import Read, Site, TensorSlice, WeightSite


# What a criterion may ask for; each is the field of `Statistics` of the same name.
SQUARED_INPUTS = "squared_inputs"
MEAN_INPUTS = "mean_inputs"
FIRING = "firing"
SQUARED_UPDATES = "squared_updates"
TURNS = "turns"
GATE_GRADIENTS = "gate_gradients"
SQUARED_GATE_GRADIENTS = "squared_gate_gradients"
SQUARED_TOKEN_GATES = "squared_token_gates"
WEIGHT_GRADIENTS = "weight_gradients"
MOVEMENT = "movement"
ROUTED_SHARES = "routed_shares"
ROUTED_NORMS = "routed_norms"
_OF_GATES = frozenset({GATE_GRADIENTS, SQUARED_GATE_GRADIENTS, SQUARED_TOKEN_GATES})
# of which those of layers look at what goes in and comes out
NEEDS_OF_LAYERS = frozenset({SQUARED_UPDATES, TURNS}) | _OF_GATES
NEEDS_OF_GRADIENTS = frozenset({WEIGHT_GRADIENTS}) | _OF_GATES
# what is looked at where units are read, by hooks on the modules that read them
NEEDS_OF_READS = frozenset({SQUARED_INPUTS, MEAN_INPUTS, FIRING}) | _OF_GATES
NEEDS_OF_TRAINING = frozenset({MOVEMENT})  # what no pass over calibration data tells


@dataclass
class Statistics:
    """Sums and means over all calibration samples and processes; float64, on the CPU. A need not asked for is empty.

    Attributes:
        squared_inputs: by module name, (d_in,): mean over tokens of the squared input, padding left out.
        mean_inputs: by module name, (d_in,): mean over tokens of the input.
        firing: by module name, (d_in,): share of tokens in which the input is more than a tenth of the root mean square
            of all inputs of that token.
        squared_updates: by site key, (n_units,): mean over tokens and entries of (output - input)² of each layer.
        turns: by site key, (n_units,): mean over tokens of 1 - cos(input, output) of each layer.
        gate_gradients: by site key, (n_units,): sum over samples of |dL/dg|, g a factor on the unit's contribution.
        squared_gate_gradients: by site key, (n_units,): sum over samples of (dL/dg)².
        squared_token_gates: by site key, (n_units,): sum over positions of (dL/dg)², g a factor at that position alone.
        weight_gradients: by parameter name, its shape: dL/dw.
        movement: by site key, (n_units,) or the weight's shape, float32: -Σ w dL/dw over the optimizer's steps, see
            `hf_prune.training.movement`; 0 for what has left.
        routed_shares: by site key, (n_units,): share of tokens that are sent to each expert.
        routed_norms: by site key, (n_units,): mean over the tokens sent to an expert of its weight times |expert(x)|.
        n_samples: samples seen.
        n_labels: label tokens (or samples with a label) that the loss L, a sum, was divided by; 0 without gradients.
    """

    squared_inputs: dict[str, Tensor] = field(default_factory=dict)
    mean_inputs: dict[str, Tensor] = field(default_factory=dict)
    firing: dict[str, Tensor] = field(default_factory=dict)
    squared_updates: dict[str, Tensor] = field(default_factory=dict)
    turns: dict[str, Tensor] = field(default_factory=dict)
    gate_gradients: dict[str, Tensor] = field(default_factory=dict)
    squared_gate_gradients: dict[str, Tensor] = field(default_factory=dict)
    squared_token_gates: dict[str, Tensor] = field(default_factory=dict)
    weight_gradients: dict[str, Tensor] = field(default_factory=dict)
    movement: dict[str, Tensor] = field(default_factory=dict)
    routed_shares: dict[str, Tensor] = field(default_factory=dict)
    routed_norms: dict[str, Tensor] = field(default_factory=dict)
    n_samples: int = 0
    n_labels: int = 0


def parameter_names(model: nn.Module, sites: Sequence[Site | WeightSite]) -> list[str]:
    """The parameters that leave, whole or in part, with the units of `sites`; buffers left out, each name once."""
    names: dict[str, None] = {}
    for site in sites:
        if isinstance(site, WeightSite):
            names[site.name] = None
        elif site.branches:
            names.update(dict.fromkeys(name for branch in site.branches for name in branch.parameters))
        elif site.target == "layers":
            for block in dict.fromkeys(site.blocks):
                names.update(
                    dict.fromkeys(f"{block}.{name}" for name, _ in model.get_submodule(block).named_parameters())
                )
        else:
            names.update((piece.name, None) for piece in site.slices if is_parameter(model, piece))
    return list(names)


def is_parameter(model: nn.Module, piece: TensorSlice) -> bool:
    """False for the buffers among the slices, which have no gradient."""
    return isinstance(getattr(model.get_submodule(piece.module), piece.tensor), nn.Parameter)


def output_slice(site: Site, read: Read) -> TensorSlice:
    """The columns of the output projection that read the units, or its rows for Conv1D: `dim` says which."""
    for piece in site.slices:
        if piece.module == read.module and piece.tensor == "weight" and not piece.writes:
            return piece
    raise AssertionError(f"{site.key}: the read at {read.module} has no slice of its weight")
