"""TIES: trim every change to its largest elements, elect a sign for each, average those that have it.

https://arxiv.org/abs/2306.01708, which trims all of a task vector at once to 20 %; here, as in PEFT and mergekit, it
is each matrix by itself, so that none is trimmed away as a whole.  The paper has no weights.  Here a change at weight
w is w times the change, in the election as well, and the mean is over the number of those that agree: weights are not
normalised.  PEFT's ``ties_svd`` is ``election="peft"``; mergekit's ``ties`` is ``election="mergekit"`` with
``normalize=True`` or ``False``, as it is there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from lorahub.composition.algebra.elements import trim
from lorahub.composition.method import Method, PerAdapter, Terms
from lorahub.composition.methods.thinning import Elected
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch

__all__ = ["Ties"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Ties(Elected):
    """``lambda * mean of w_i * trimmed_i over those of the elected sign``.

    Attributes:
        density: the share of elements of each matrix that is kept, those of largest magnitude.
    """

    density: PerAdapter = 0.2

    name: ClassVar[str] = "ties"
    title: ClassVar[str] = "TIES: trim, elect sign, merge"
    source: ClassVar[str] = "https://arxiv.org/abs/2306.01708"

    def thin(self, change: torch.Tensor, density: float, number: int, terms: Terms) -> None:
        """All but the largest become zero."""
        trim(change, density)


@hookimpl
def lorahub_methods() -> list[type[Method]]:
    """TIES."""
    return [Ties]
