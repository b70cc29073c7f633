"""What a module's code says: the numbers by which it reshapes, and the config fields that it reads as it runs."""

from __future__ import annotations

import inspect
import re
from functools import cache
from typing import Any

from torch import nn


def forward_of(module: nn.Module) -> str:
    """The code of its forward pass alone."""
    kind: Any = type(module)
    return _code(kind.forward)


def source_of(module: nn.Module) -> str:
    """What its class runs, without what builds it."""
    kind: Any = type(module)
    return _methods(kind)


def reshapes_by(source: str, field: str) -> bool:
    """Whether it gives a tensor a shape by `self.<field>`."""
    inner = r"(?:[^()]|\([^()]*\))*"
    return re.search(rf"\.(?:view|reshape|split)\({inner}\(?{inner}self\.{field}\b", source) is not None


def reads_config(source: str, field: str) -> bool:
    """Whether it reads `self.config.<field>` as it runs: then it needs a view of the config with its own number."""
    return re.search(rf"self\.config\.{field}\b", source) is not None


@cache  # Python takes a whole file apart to find a function
def _methods(kind: Any) -> str:
    own = kind.__mro__[: kind.__mro__.index(nn.Module)]
    members = [vars(each).items() for each in own]
    return "".join(
        _code(member) for each in members for name, member in each if inspect.isfunction(member) and name != "__init__"
    )


@cache
def _code(function: Any) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return ""  # generated code has no source; verification is the safety net
