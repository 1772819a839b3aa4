"""Modules that load at first use, so that holding, checking and moving adapters never needs them.

``from lorahub.lazy import torch`` binds a stand-in whose first attribute access imports the real module.  Type
checkers see the real one.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lorahub.errors import MissingDependency

__all__ = ["np", "torch"]


class _Lazy(ModuleType):
    """A module that is imported when an attribute is first asked for."""

    def __init__(self, name: str, install: str) -> None:
        super().__init__(name)
        self._install = install

    def __getattr__(self, attribute: str) -> Any:  # the attributes of a module are of any type
        try:
            module = import_module(self.__name__)
        except ModuleNotFoundError as error:
            if error.name != self.__name__:
                raise
            raise MissingDependency(
                f"{self.__name__} is needed to compute with weights and is not installed", self._install
            ) from None
        value = getattr(module, attribute)
        setattr(self, attribute, value)  # later accesses cost an ordinary attribute
        return value


if TYPE_CHECKING:
    import numpy as np
    import torch
else:
    np = _Lazy("numpy", "pip install 'lorahub-core[torch]'")
    torch = _Lazy("torch", "pip install 'lorahub-core[torch]'")
