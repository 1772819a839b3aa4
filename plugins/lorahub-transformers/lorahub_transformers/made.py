"""What ``from_pretrained`` remembers on a model: how its adapters are attached, and where it came from.

It lies on the model, so that it goes when the model goes.  A copy of the model has a handle of its own, which
``lorahub.handle`` knows.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from lorahub.attaching import handle as lorahub_handle
from lorahub.errors import UsageError
from lorahub_transformers.origin import MADE, Origin

if TYPE_CHECKING:
    from torch import nn

    from lorahub.engine.changing.merge import Merged
    from lorahub.live.attached import Live

__all__ = ["Handle", "Made", "handle", "made_of", "remember"]

Handle: TypeAlias = "Live | Merged"


@dataclass(slots=True, eq=False)
class Made:
    """How a model was made.

    Attributes:
        handle: what its adapters were attached or merged with; None in a copy of the model.
        origin: where the base lies.
        folders: name -> where the adapter lies.
    """

    handle: Handle | None
    origin: Origin
    folders: dict[str, Path]

    def __deepcopy__(self, _memo: dict[int, Any]) -> Made:
        return Made(None, self.origin, self.folders)

    def __reduce__(self) -> tuple[Any, ...]:
        return Made, (None, Origin(), {})


def remember(model: nn.Module, made: Made) -> None:
    """Keep it with the model."""
    vars(model)[MADE] = made


def made_of(model: nn.Module) -> Made:
    """What was kept with the model.

    Raises:
        UsageError: the model is not from ``from_pretrained``.
    """
    found = vars(model).get(MADE)
    if not isinstance(found, Made):
        raise UsageError(
            "this model was not made by lorahub_transformers.from_pretrained", "lorahub.attach gives its own handle"
        )
    return found


def handle(model: nn.Module) -> Handle:
    """What ``from_pretrained`` attached (choose, weigh, exchange, detach) or merged (undo).

    Raises:
        UsageError: the model is not from there, or it is a copy without adapters, as of one whose were merged.
    """
    found = made_of(model).handle
    return cast("Handle", lorahub_handle(model)) if found is None else found
