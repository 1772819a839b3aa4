"""lorahub for timm models.  Importing it imports neither torch nor timm."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lorahub.bases.framework import Framework
from lorahub.hookspecs import hookimpl
from lorahub_timm.framework import Timm

if TYPE_CHECKING:
    from lorahub_timm.creating import create_model, handle

__all__ = ["LORAHUB_HOOKS", "Timm", "create_model", "handle", "lorahub_frameworks"]

LORAHUB_HOOKS = (1, 0)

_CREATING = ("create_model", "handle")


def __getattr__(name: str) -> Any:
    """What needs torch, when it is asked for."""
    if name in _CREATING:
        return getattr(import_module("lorahub_timm.creating"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@hookimpl
def lorahub_frameworks() -> list[Framework]:
    """The framework "timm"."""
    return [Timm()]
