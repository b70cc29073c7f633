"""Calling a function once a module has been imported, without importing it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


def call(module: str, function: Callable[[], None]) -> None:
    """Call `function` when `module` has been imported: now, if it is already."""
    if module in sys.modules:
        function()
    else:
        sys.meta_path.insert(0, _Finder(module, function))


class _Finder(MetaPathFinder):
    """Steps aside at once when its module is asked for, and wraps the loader that the others find."""

    def __init__(self, module: str, function: Callable[[], None]):
        self.module, self.function = module, function

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.module:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.function)
        return spec


class _Loader(Loader):
    def __init__(self, loader: Loader, function: Callable[[], None]):
        self.loader, self.function = loader, function

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.function()

    def __getattr__(self, name: str) -> object:
        # inspect and linecache ask the loader for sources
        return getattr(self.loader, name)
