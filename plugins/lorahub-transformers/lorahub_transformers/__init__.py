"""lorahub for Transformers models.  Importing it imports neither torch nor transformers."""

from __future__ import annotations

from lorahub.bases.framework import Framework
from lorahub.hookspecs import hookimpl
from lorahub_transformers.framework import Transformers

__all__ = ["LORAHUB_HOOKS", "Transformers", "lorahub_frameworks"]

LORAHUB_HOOKS = (1, 0)


@hookimpl
def lorahub_frameworks() -> list[Framework]:
    """The framework "transformers"."""
    return [Transformers()]
