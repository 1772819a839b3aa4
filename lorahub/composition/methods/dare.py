"""DARE: drop elements at random, divide the others by the probability of being kept; then add, or go on as TIES.

https://arxiv.org/abs/2311.03099.  ``density`` is 1 - p, p being the paper's drop rate, for which it tries 0.1 to 0.9
and names none.  PEFT's ``dare_linear_svd`` and ``dare_ties_svd`` are the same, but for the election (``peft``).
mergekit's ``rescale: true`` gives each change back the L1 norm that it had, whatever was drawn: ``rescale="l1"``.
Like both, ``dare_ties`` trims nothing besides.

What is dropped of an adapter follows from the recipe's seed, its digest and the target alone: not from the other
adapters, their order, or the number of threads.  In the basis ``core`` or ``knots`` the elements themselves depend on
the other adapters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

from lorahub.composition.algebra.elements import drop
from lorahub.composition.method import Method, PerAdapter, Terms
from lorahub.composition.methods.thinning import Elected, Summed
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch

__all__ = ["DareLinear", "DareTies"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class DareLinear(Summed):
    """``lambda * sum of w_i * dropped_i``; its expectation is the weighted sum.

    Attributes:
        density: the probability of each element to be kept.
        rescale: True divides what is kept by its probability.
    """

    density: PerAdapter = 0.5
    rescale: bool | Literal["l1"] = True

    name: ClassVar[str] = "dare_linear"
    title: ClassVar[str] = "DARE: drop and rescale, then add"
    source: ClassVar[str] = "https://arxiv.org/abs/2311.03099"
    draws: ClassVar[bool] = True

    def thin(self, change: torch.Tensor, density: float, number: int, terms: Terms) -> None:
        """Drop at random."""
        drop(change, density, terms.draw(number), rescale=self.rescale is True)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class DareTies(Elected):
    """``lambda * mean of w_i * dropped_i over those of the elected sign``.

    Attributes:
        density: the probability of each element to be kept.
        rescale: True divides what is kept by its probability.
    """

    density: PerAdapter = 0.5
    rescale: bool | Literal["l1"] = True

    name: ClassVar[str] = "dare_ties"
    title: ClassVar[str] = "DARE: drop and rescale, then elect signs"
    source: ClassVar[str] = "https://arxiv.org/abs/2311.03099"
    draws: ClassVar[bool] = True

    def thin(self, change: torch.Tensor, density: float, number: int, terms: Terms) -> None:
        """Drop at random."""
        drop(change, density, terms.draw(number), rescale=self.rescale is True)


@hookimpl
def lorahub_methods() -> list[type[Method]]:
    """DARE, added or elected."""
    return [DareLinear, DareTies]
