"""lorahub for Transformers models.  Importing it imports neither torch nor transformers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lorahub.bases.framework import Framework
from lorahub.hookspecs import hookimpl
from lorahub_transformers.framework import Transformers

if TYPE_CHECKING:
    from lorahub_transformers.callback import RecordCallback
    from lorahub_transformers.checkpoints import TraineeCallback
    from lorahub_transformers.inputs import tasks
    from lorahub_transformers.loading import from_pretrained, handle, tokenizer_of

__all__ = [
    "LORAHUB_HOOKS",
    "RecordCallback",
    "TraineeCallback",
    "Transformers",
    "from_pretrained",
    "handle",
    "lorahub_frameworks",
    "tasks",
    "tokenizer_of",
]

LORAHUB_HOOKS = (1, 0)

_HOME = {
    "RecordCallback": "callback",
    "TraineeCallback": "checkpoints",
    "from_pretrained": "loading",
    "handle": "loading",
    "tasks": "inputs",
    "tokenizer_of": "loading",
}
"""What needs torch and transformers -> the module it is in."""


def __getattr__(name: str) -> Any:
    """What needs torch and transformers, when it is asked for."""
    if name in _HOME:
        return getattr(import_module(f"lorahub_transformers.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@hookimpl
def lorahub_frameworks() -> list[Framework]:
    """The framework "transformers"."""
    return [Transformers()]
