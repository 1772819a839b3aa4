"""Magnitude pruning: of every change the largest elements, added.

PEFT's ``magnitude_prune`` does this to the factors A and B by themselves, and to the change itself in
``magnitude_prune_svd``; here it is the change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from lorahub.composition.algebra.elements import trim
from lorahub.composition.method import Method, PerAdapter, Terms
from lorahub.composition.methods.thinning import Summed
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch

__all__ = ["MagnitudePrune"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class MagnitudePrune(Summed):
    """``lambda * sum of w_i * trimmed_i``.

    Attributes:
        density: the share of elements of each matrix that is kept, those of largest magnitude.
    """

    density: PerAdapter = 0.2

    name: ClassVar[str] = "magnitude_prune"
    title: ClassVar[str] = "magnitude pruning"
    source: ClassVar[str] = "PEFT, combination_type='magnitude_prune_svd'"

    def thin(self, change: torch.Tensor, density: float, number: int, terms: Terms) -> None:
        """All but the largest become zero."""
        trim(change, density)


@hookimpl
def lorahub_methods() -> list[type[Method]]:
    """Magnitude pruning."""
    return [MagnitudePrune]
