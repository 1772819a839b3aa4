"""Model Breadcrumbs: of every matrix neither the outliers nor the small elements; then add, or go on as TIES.

https://arxiv.org/abs/2312.06795, whose masks remove the share β of smallest and the largest elements.  Spelled as in
mergekit: ``density`` is the share that is kept, ``gamma`` that of the largest which are removed, and the rest of β
follows.  The paper's α is ``lambda``; its own values keep about a tenth and remove one in a hundred.
``breadcrumbs_ties`` is mergekit's (``election="mergekit"``, ``normalize=False`` for its very result).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from lorahub.composition.algebra.elements import keep_between
from lorahub.composition.method import Method, PerAdapter, Terms, each_of
from lorahub.composition.methods.thinning import Elected, Summed, expect_number, listed
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch

__all__ = ["Breadcrumbs", "BreadcrumbsTies"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Breadcrumbs(Summed):
    """``lambda * sum of w_i * masked_i``.

    Attributes:
        density: the share of elements of each matrix that is kept.
        gamma: the share of largest elements that is removed, one for all adapters or one for each; fewer go where
            density leaves no room, none where density is 1.
    """

    density: PerAdapter = 0.1
    gamma: PerAdapter = 0.01

    name: ClassVar[str] = "breadcrumbs"
    title: ClassVar[str] = "Model Breadcrumbs"
    source: ClassVar[str] = "https://arxiv.org/abs/2312.06795"

    def __post_init__(self) -> None:
        Summed.__post_init__(self)
        for share in listed(self.gamma):
            expect_number("gamma", share, least=0.0, below=1.0)

    def thin(self, change: torch.Tensor, density: float, number: int, terms: Terms) -> None:
        """The largest and the smallest become zero."""
        keep_between(change, density, each_of(self.gamma, len(terms.weights), "gamma")[number])


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class BreadcrumbsTies(Elected):
    """``lambda * mean of w_i * masked_i over those of the elected sign``.

    Attributes:
        density: the share of elements of each matrix that is kept.
        gamma: the share of largest elements that is removed, one for all adapters or one for each; fewer go where
            density leaves no room, none where density is 1.
    """

    density: PerAdapter = 0.1
    gamma: PerAdapter = 0.01

    name: ClassVar[str] = "breadcrumbs_ties"
    title: ClassVar[str] = "Model Breadcrumbs with elected signs"
    source: ClassVar[str] = "mergekit, merge_method: breadcrumbs_ties"

    def __post_init__(self) -> None:
        Elected.__post_init__(self)
        for share in listed(self.gamma):
            expect_number("gamma", share, least=0.0, below=1.0)

    def thin(self, change: torch.Tensor, density: float, number: int, terms: Terms) -> None:
        """The largest and the smallest become zero."""
        keep_between(change, density, each_of(self.gamma, len(terms.weights), "gamma")[number])


@hookimpl
def lorahub_methods() -> list[type[Method]]:
    """Breadcrumbs, added or elected."""
    return [Breadcrumbs, BreadcrumbsTies]
