"""How much of a model is trained, in parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from lorahub.bases.torch_module import CHILD
from lorahub.storages.storage import held_in

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Counts", "count"]


@final
@dataclass(frozen=True, slots=True)
class Counts:
    """Numbers of parameters; of a quantised weight, those that it stands for.

    Attributes:
        trained: what the optimizer changes.
        total: that and the base.
    """

    trained: int
    total: int

    @property
    def percent(self) -> float:
        """Of the total, what is trained."""
        return 100 * self.trained / self.total if self.total else 0.0

    def __str__(self) -> str:
        return f"{self.trained:,} of {self.total:,} parameters are trained ({self.percent:.4g} %)"


def count(model: nn.Module) -> Counts:
    """Count a model that an adapter is trained on; the parameters of tied modules once."""
    held = held_in(model)
    codes = {name: math.prod(one.shape) for name, one in held.items()}
    seen: set[int] = set()
    trained = base = 0
    for name, own in model.named_parameters(remove_duplicate=False):
        if id(own) in seen:
            continue
        seen.add(id(own))
        if CHILD in name.split("."):
            trained += own.numel() if own.requires_grad else 0
        else:
            base += codes.get(name, own.numel())
    return Counts(trained, base + trained)
