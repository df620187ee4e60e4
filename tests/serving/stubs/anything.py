"""Stand-ins for packages whose PyPI wheels need CUDA: every submodule imports, every name is there.

SGLang names triton and torchvision while it is imported on a CPU and runs nothing of them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, ClassVar


class _ClassNames(type):
    """Attributes of a stand-in class are its dotted names, as enumerations are used."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


class Anything(ModuleType):
    """A module, a function and a decorator; capitalised names in it are classes."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name[0].isupper():
            value: Any = _ClassNames(name, (), {"__init__": lambda self, *args, **kwargs: None})
        else:
            value = Anything(f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        is_bare_decorator = len(args) == 1 and callable(args[0]) and not kwargs
        return args[0] if is_bare_decorator else lambda function: function

    def __getitem__(self, key: object) -> Anything:
        return self

    # torch asks `"cpu" in triton.backends.backends`; with __getitem__ alone that never ends.
    def __contains__(self, key: object) -> bool:
        return False

    def __iter__(self) -> Iterator[Any]:
        return iter(())


class _Finder(MetaPathFinder, Loader):
    """Makes every submodule of one package."""

    def __init__(self, package: str) -> None:
        self.prefix = f"{package}."

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.startswith(self.prefix) else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Anything(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def stand_in(package: str, version: str) -> None:
    """Makes the package that is just being imported a stand-in of that version."""
    module: Any = sys.modules[package]
    module.__class__ = Anything
    module.__version__ = version
    sys.meta_path.insert(0, _Finder(package))
