"""Looking modules up by path, and the few things that a model says about itself."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class ModuleNames:
    """All modules of a model by qualified name, with the look-ups that discovery needs."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.modules: dict[str, nn.Module] = dict(model.named_modules())

    def resolve(self, base: str, path: str) -> str:
        """The qualified name of `path` seen from `base`; `../` climbs one level."""
        while path.startswith("../"):
            base, path = base.rpartition(".")[0], path[3:]
        return f"{base}.{path}" if base else path

    def get(self, base: str, path: str) -> nn.Module | None:
        return self.modules.get(self.resolve(base, path))

    def inside(self, name: str) -> Iterator[str]:
        """The modules below `name`."""
        return (other for other in self.modules if other.startswith(f"{name}."))

    def parent(self, name: str) -> str:
        return name.rpartition(".")[0]

    def config_of(self, name: str) -> Any:
        """The config of the nearest module at or above `name` that has one."""
        while True:
            config = getattr(self.modules.get(name), "config", None)
            if config is not None or not name:
                return config
            name = self.parent(name)

    def embedding_parameters(self) -> Iterator[Tensor]:
        for module in self.modules.values():
            if isinstance(module, nn.Embedding):
                yield module.weight

    def output_head_modules(self) -> set[str]:
        """Linear layers that aren't inside a repeated block and turn hidden states into outputs.

        That is the model's declared output embedding, and every linear layer of a task head: outside the base model.
        """
        heads: set[int] = set()
        for module in self.modules.values():
            declared = getattr(module, "get_output_embeddings", None)
            output = declared() if callable(declared) else None
            if isinstance(output, nn.Module):
                heads.add(id(output))
        base = getattr(self.model, "base_model", None)
        inside = {id(module) for module in base.modules()} if isinstance(base, nn.Module) else set()
        if base is not None and base is not self.model:
            heads |= {
                id(module)
                for module in self.modules.values()
                if isinstance(module, (nn.Linear, Conv1D)) and id(module) not in inside
            }
        return {name for name, module in self.modules.items() if id(module) in heads}


def number(module: nn.Module, names: tuple[str, ...]) -> tuple[str, int] | None:
    """The first of `names` that is a plain positive int on `module`, with its value."""
    for name in names:
        value = module.__dict__.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return name, value
    return None


def read_number(config: Any, names: tuple[str, ...]) -> int | None:
    """The first of `names` that a config says as a positive int."""
    for name in names:
        try:
            value = getattr(config, name, None)
        except RuntimeError:  # configs with per-layer values refuse to say one for all
            continue
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def read_list(config: Any, name: str) -> list[Any] | None:
    """A field of a config that is a list, not empty."""
    try:
        value = getattr(config, name, None)
    except RuntimeError:  # as above
        return None
    return list(value) if isinstance(value, (list, tuple)) and value else None


def attribute_at(module: nn.Module, path: str) -> Any:
    """An attribute of an attribute, and so on; None where there is none."""
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


def weight_of(module: nn.Module) -> Tensor:
    """Its `weight`, which `nn.Module` can't promise to be a tensor."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def d_out(module: nn.Module) -> int:
    """The number of outputs of a linear layer, `nn.Linear` (d_out, d_in) or `Conv1D` (d_in, d_out)."""
    return weight_of(module).shape[1 if isinstance(module, Conv1D) else 0]


def d_in(module: nn.Module) -> int:
    """The number of inputs of a linear layer."""
    return weight_of(module).shape[0 if isinstance(module, Conv1D) else 1]


def parents(name: str) -> Iterator[str]:
    """The names of the modules around `name`, the model's own (empty) last."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def is_within(name: str, module: str) -> bool:
    """Whether `name` is the module or inside of it."""
    return f"{name}.".startswith(f"{module}.")


def is_attention(module: nn.Module) -> bool:
    """Whether its class calls itself one."""
    return re.search("Attention|Attn", type(module).__name__) is not None


def is_absent(module: nn.Module) -> bool:
    """Whether it stands for one that has left: by name, since checkpoints bring a file of their own that defines it."""
    return type(module).__name__ == "Absent"


def is_linear(module: nn.Module | None) -> bool:
    return isinstance(module, (nn.Linear, Conv1D))


def is_pointwise(module: nn.Module | None) -> bool:
    """A linear layer, or a convolution that sees one position at a time."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return set(module.kernel_size) == {1} and module.groups == 1
    return is_linear(module)
