"""The proof, of one model type at a time: for each target and scope, found, exact, counted, saved and loaded, trained, or refused.

What is compared is hf_prune against itself (its own verification) and against plain PyTorch: logits of the masked and of
the smaller model here, parameters counted one by one, classes loaded by Transformers. An outcome starts with one of

    proven                  each check passed
    refused: why            an error of hf_prune, and the model is as it was
    WRONG: what             it passed while wrong, failed with an error of someone else, or left out in silence what the census holds
    none                    the model holds no such thing, by the census and by hf_prune
"""

from __future__ import annotations

import copy
import re
import tempfile
import traceback
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from hf_prune import apply_, make_plan, prune_
from hf_prune.errors import PruneError
from hf_prune.pipeline import smaller_copy
from hf_prune.plan import PruningPlan
from hf_prune.structure import ModelStructure, inspect_model
from hf_prune.structure.cost import parameter_costs
from tests.reach.zoo import Built
from tests.zoo import is_before


TARGETS = ("ffn_neurons", "attention_heads", "layers", "layers.attention", "layers.feed_forward", "weights")
SCOPES = ("global", "layer")
HELD_AS = {  # what the census calls that which a target is about
    "ffn_neurons": "feed_forward",
    "attention_heads": "attention",
    "layers": "layers",
    "layers.attention": "attention",
    "layers.feed_forward": "feed_forward",
}
N_DRAWS = 6
SHARES = (0.5, 0.34)
END_TO_END = {torch.float64: 1e-6, torch.float32: 1e-4}


class Wrong(Exception):
    """The library did something else than it promises; the message says what."""


@dataclass
class Subject:
    """A model type's model, its inputs and what it could do before anything was removed."""

    built: Built
    model: nn.Module
    inputs: dict[str, Any]
    structure: ModelStructure
    can: dict[str, bool] = field(default_factory=dict)

    @classmethod
    def of(cls, built: Built, *, quick: bool = False) -> Subject:
        """In float64 where it runs, else as built; `quick` leaves out to save, generate and train."""
        eager(built.model)
        model, inputs = copy.deepcopy(built.model).double(), tree_map(_double, built.inputs)
        try:
            is_fit = not any(tensor.isnan().any() for tensor in outputs(model, inputs))
        except (RuntimeError, TypeError, ValueError, NotImplementedError):
            is_fit = False
        if not is_fit:
            model, inputs = built.model, built.inputs
        subject = cls(built, model, inputs, inspect_model(model))
        repeats = _same(outputs(model, inputs), outputs(model, inputs), 0.0)
        subject.can = dict.fromkeys(("train", "save", "generate"), False) | {"repeat": repeats}
        if quick:
            return subject
        subject.can |= {
            "train": _works(trained, model, inputs),
            "save": _works(_saved_and_loaded, model, inputs),
            "generate": bool(getattr(model, "can_generate", lambda: False)()) and _works(generated, model, inputs),
        }
        return subject


def prove(subject: Subject, target: str, scope: str, held: Mapping[str, list[str]]) -> str:
    """The outcome of one target and scope; `held` is the census's entry of this type."""
    try:
        before = state_of(subject.model)
        try:
            return _proven(subject, target, scope, held)
        except PruneError as refusal:
            if not _unchanged(before, state_of(subject.model)):
                raise Wrong(f"refused, but the model changed: {refusal}") from refusal
            return _refused(subject, target, refusal, held)
    except Wrong as wrong:
        return f"WRONG: {wrong}"
    except Exception as error:  # any other is the library's fault: what it can't do it has to refuse
        at = [f for f in traceback.extract_tb(error.__traceback__) if "/hf_prune/" in f.filename]
        where = f" ({at[-1].filename.rpartition('/')[2]}, {at[-1].name})" if at else ""
        return f"WRONG: {type(error).__name__}{where}: {_short(str(error))}"


def _refused(subject: Subject, target: str, refusal: PruneError, held: Mapping[str, list[str]]) -> str:
    said = re.search(r"can be pruned: (.*?)\. Found: ", str(refusal), re.DOTALL)
    reason = said[1] if said else f"{type(refusal).__name__}: {refusal}"
    if said and reason.startswith("no block matches a known layout") and not held_of(target, held):
        return "none"
    return f"refused: {_short(reason)}"


def _proven(subject: Subject, target: str, scope: str, held: Mapping[str, list[str]]) -> str:
    kind, _, part = target.partition(".")
    plan = _plan(subject, kind, part, scope)
    if kind != "weights" and all(keep.all() for keep in plan.masks.units.values()):
        return "refused: of the single unit of each site none can leave"
    masked = copy.deepcopy(subject.model)
    apply_(masked, plan)
    reference = outputs(masked, subject.inputs)
    smaller = copy.deepcopy(masked)
    if kind == "weights":
        _check_weights(subject, plan, masked)
    else:
        batches = [subject.inputs] if subject.can["repeat"] else []
        smaller, _, _ = smaller_copy(masked, subject.structure, batches, sample=subject.inputs)
        if subject.can["repeat"] and not _same(
            reference, outputs(smaller, subject.inputs), END_TO_END[next(masked.parameters()).dtype]
        ):
            raise Wrong("masked and smaller model differ")
        _check_count(subject, plan, smaller)
    if subject.can["repeat"] and _same(reference, outputs(subject.model, subject.inputs), 0.0):
        raise Wrong("what was removed changes no output of the model")
    notes = list(_checked(subject, smaller))
    if lost := missed(subject.model, subject.structure, target, held):
        raise Wrong(f"proven, but it leaves out in silence: {', '.join(lost)}")
    return "proven" + (f" ({', '.join(notes)})" if notes else "")


def _plan(subject: Subject, kind: str, part: str, scope: str) -> PruningPlan:
    """Half of what there is; by another draw, then a third, where that leaves a stack without what its other blocks depend on.

    A tiny model has three blocks, and one of each of two kinds has to stay.
    """
    step = {"target": kind, "scope": scope, "criterion": "l1" if kind == "weights" else "random"}
    step |= {"part": part} if part else {}
    draws = [(sparsity, seed) for sparsity in SHARES for seed in range(N_DRAWS)]
    for sparsity, seed in draws:
        recipe = {"version": 1, "name": "proof", "seed": seed, "prune": [step | {"sparsity": sparsity}]}
        plan = make_plan(subject.model, recipe, calibration=[subject.inputs])
        try:
            apply_(copy.deepcopy(subject.model), plan)
        except PruneError as refusal:
            if "keep one" not in str(refusal) or (sparsity, seed) == draws[-1]:
                raise
        else:
            return plan
    raise AssertionError("a draw was taken or raised")


def _checked(subject: Subject, smaller: nn.Module) -> Iterator[str]:
    """Save, load, generate and train what is left; names of the checks that the dense model fails too."""
    inputs, checks = subject.inputs, {"save": _saved_and_loaded, "generate": generated, "train": trained}
    for name, check in checks.items():
        if subject.can[name]:
            try:
                check(smaller, inputs)
            except PruneError:
                raise
            except Exception as error:
                raise Wrong(f"it doesn't {name}: {type(error).__name__}: {_short(str(error))}") from error
        elif name != "generate":
            yield f"neither it nor the dense model can {name} here"


def missed(model: nn.Module, structure: ModelStructure, target: str, held: Mapping[str, list[str]]) -> list[str]:
    """What the census holds of a target and hf_prune neither found nor refused. Names have `*` for numbers.

    Parts are those of layers, and count by stack: an attention to another stack is no part, by definition.
    """
    if target == "weights":
        return []
    own = [site for site in structure.sites if site.kind == target]
    places = [name for site in own for name in (site.name, *site.blocks, *(piece.module for piece in site.slices))]
    places += [refusal.name for refusal in structure.refusals if refusal.kind == target]
    known = {starred(place) for place in places}
    names = held_of(target, held)
    if is_before("5.23"):  # which the census is of
        here = {starred(name) for name, _ in model.named_modules()}
        names = sorted({_name_here(name, here) for name in names} - {""})
    return [name for name in names if not any(_overlap(name, place) for place in known)]


def _name_here(name: str, here: Collection[str]) -> str:
    """A place of the census in the model of an older Transformers, where it may be less deep; "" where there is none."""
    while name and name not in here:
        name = name.partition(".")[2]
    return name


def held_of(target: str, held: Mapping[str, list[str]]) -> list[str]:
    """What of the census a target is about: of parts, the stacks whose blocks hold one."""
    if target == "weights":
        return ["all"]
    names = held[HELD_AS[target]]
    if "." not in target:
        return names
    return [stack for stack in held["layers"] if any(name.startswith(f"{stack}.") for name in names)]


def starred(name: str) -> str:
    """`layers.3.mlp` -> `layers.*.mlp`."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _overlap(one: str, other: str) -> bool:
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _check_weights(subject: Subject, plan: PruningPlan, masked: nn.Module) -> None:
    """Half of each matrix, or of all together, is zero; all else is as it was, bit for bit."""
    dense, zeroed = dict(subject.model.named_parameters()), dict(masked.named_parameters())
    for name, parameter in dense.items():
        keep = plan.masks.weights.get(name, torch.ones_like(parameter, dtype=torch.bool))
        if not torch.equal(zeroed[name], parameter * keep):
            raise Wrong(f"weight pruning changed entries of {name} that it keeps")
    entries = sum(keep.numel() for keep in plan.masks.weights.values())
    gone = sum(int((~keep).sum()) for keep in plan.masks.weights.values())
    if abs(gone - entries / 2) > len(plan.masks.weights):
        raise Wrong(f"{gone} of {entries} weights were removed, not half")


def _check_count(subject: Subject, plan: PruningPlan, smaller: nn.Module) -> None:
    before = sum(parameter.numel() for parameter in subject.model.parameters())
    counted = sum(parameter.numel() for parameter in smaller.parameters())
    estimated = parameter_costs(subject.model, subject.structure, plan.masks.units).total
    if counted != estimated:
        raise Wrong(f"{before} parameters became {counted}, estimated {estimated:.0f}")
    shared = any(subject.structure[key].is_shared for key in plan.masks.units)
    if counted >= before and not shared:
        raise Wrong("no parameter left the model")


@torch.no_grad()
def outputs(model: nn.Module, inputs: Mapping[str, Any]) -> list[Tensor]:
    """The floating tensors that the model gives, from the same random state each time.

    Not those in tuples and lists, where there are others: hidden states, attentions and memories have an entry for each layer
    or head, and can't stay as many when these leave.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        given = model.eval()(**copy.deepcopy(dict(inputs)))
    items = given.items() if isinstance(given, Mapping) else enumerate(given if isinstance(given, tuple) else (given,))
    values = [value for key, value in items if key != "loss"]
    whole = [leaf for value in values for leaf in _outside_lists(value)]
    return _floating(whole) or _floating(tree_leaves(values))


def _outside_lists(value: Any) -> Iterator[Any]:
    """The leaves of nested outputs, but for what is in their tuples and lists."""
    if isinstance(value, Mapping):
        for each in value.values():
            yield from _outside_lists(each)
    elif not isinstance(value, (tuple, list)):
        yield value


def _floating(values: list[Any]) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]


def trained(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """One SGD step on the mean square of the outputs, on a copy; a gradient reaches some parameter and all are finite."""
    model = copy.deepcopy(model).train()
    given = model(**copy.deepcopy(dict(inputs)))
    leaves = [
        leaf for leaf in tree_leaves(dict(given) if isinstance(given, Mapping) else given) if isinstance(leaf, Tensor)
    ]
    loss = sum(leaf.square().mean() for leaf in leaves if leaf.is_floating_point() and leaf.requires_grad)
    assert isinstance(loss, Tensor), "no output has a gradient"
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert any(gradient.any() for gradient in gradients) and all(gradient.isfinite().all() for gradient in gradients)
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    outputs(model, inputs)


def generated(model: Any, inputs: Mapping[str, Any]) -> None:
    """Two more tokens, with a cache."""
    kept = {name: value for name, value in inputs.items() if not name.startswith(("decoder_", "labels"))}
    model.generate(**copy.deepcopy(kept), max_new_tokens=2, min_new_tokens=2, do_sample=False)


def _saved_and_loaded(model: Any, inputs: Mapping[str, Any]) -> None:
    """By the concrete class and by an Auto class that gives it, with equal outputs."""
    expected, dtype = outputs(model, inputs), next(model.parameters()).dtype
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = eager(type(model).from_pretrained(folder, dtype=dtype))
        assert _same(outputs(loaded, inputs), expected, END_TO_END[dtype]), (
            "loaded by its class it gives something else"
        )
        auto = next(
            (auto for auto in auto_classes() if auto._model_mapping.get(type(model.config), None) is type(model)), None
        )
        if auto is not None:
            loaded = eager(auto.from_pretrained(folder, dtype=dtype))
            assert type(loaded) is type(model), f"{auto.__name__} gives a {type(loaded).__name__}"
            assert _same(outputs(loaded, inputs), expected, END_TO_END[dtype]), (
                "loaded by Auto it gives something else"
            )


@cache
def auto_classes() -> tuple[Any, ...]:
    """Those that know models by their configs."""
    named = (getattr(transformers, name) for name in dir(transformers) if name.startswith("AutoModel"))
    return tuple(auto for auto in named if getattr(auto, "_model_mapping", None) is not None)


def eager(model: Any) -> Any:
    """Experts one after the other: the grouped kernels of CPUs don't take float64, nor every width."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "_experts_implementation", None) is not None:
            config._experts_implementation = "eager"
    return model


def one_shot(subject: Subject, target: str) -> str:
    """`prune_` itself, on a copy: it succeeds, or it raises an error of hf_prune and the copy is as it was."""
    kind, _, part = target.partition(".")
    step = {"target": kind, "sparsity": 0.5, "criterion": "random"} | ({"part": part} if part else {})
    model = copy.deepcopy(subject.model)
    before = state_of(model)
    try:
        prune_(model, {"version": 1, "name": "proof", "prune": [step]}, calibration=[subject.inputs])
    except PruneError as refusal:
        same = _unchanged(before, state_of(model))
        return f"refused: {_short(str(refusal))}" if same else f"WRONG: prune_ failed and changed the model: {refusal}"
    except Exception as error:
        return f"WRONG: prune_: {type(error).__name__}: {_short(str(error))}"
    return "proven"


def state_of(model: Any) -> tuple[dict[str, Tensor], str]:
    """Values of all tensors, and the config."""
    tensors = {name: value.detach().clone() for name, value in (*model.named_parameters(), *model.named_buffers())}
    return tensors, repr(sorted(model.config.__dict__.items(), key=lambda item: item[0]))


def _unchanged(before: tuple[dict[str, Tensor], str], after: tuple[dict[str, Tensor], str]) -> bool:
    names = before[0].keys() == after[0].keys()
    same = names and all(torch.equal(torch.nan_to_num(v), torch.nan_to_num(after[0][n])) for n, v in before[0].items())
    return same and before[1] == after[1]


def _same(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> bool:
    """max|difference| at most `tolerance` max|expected|, tensor by tensor; 0 asks for the same numbers."""
    if [tensor.shape for tensor in actual] != [tensor.shape for tensor in expected]:
        return False
    return all(
        a.numel() == 0
        or float((a - b).abs().nan_to_num(0.0).max()) <= tolerance * float(b.abs().nan_to_num(0.0).max())
        for a, b in zip(actual, expected, strict=True)
    )


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _works(check: Any, model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    try:
        check(model, inputs)
    except Exception:  # whatever the dense model can't do is no fault of pruning
        return False
    return True


def _short(text: str) -> str:
    text = " ".join(starred(word) if "." in word else word for word in text.split())
    return text if len(text) <= 300 else f"{text[:299]}…"
