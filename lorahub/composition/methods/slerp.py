"""SLERP: along the great circle from one change to the other (Shoemake, 1985), as mergekit does it with whole weights.

The angle comes from the Gram matrix of the changes, so that nothing of a weight's size is made.  A change of zero
counts as orthogonal to everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from lorahub.composition.algebra.angles import Scope, between, cosines, known_scope, weighted
from lorahub.composition.method import GramMethod, Method
from lorahub.composition.methods.thinning import expect_number
from lorahub.errors import UsageError
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch

__all__ = ["Slerp"]

STRAIGHT = 1 - 0.9995**2
"""mergekit interpolates linearly where the cosine is above 0.9995 or below -0.9995."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Slerp(GramMethod):
    """``sin((1 - t) w) / sin w * d_1 + sin(t w) / sin w * d_2`` with the angle w between the changes d.

    Each change is taken times its weight first; the place between them is ``t`` alone.

    Attributes:
        t: 0 is the first adapter, 1 the second.
        scope: whose angle: each target's own, or that of the whole adapters.

    Raises:
        UsageError: a value is out of its range.
    """

    t: float = 0.5
    scope: Scope = "target"

    name: ClassVar[str] = "slerp"
    title: ClassVar[str] = "spherical interpolation"
    source: ClassVar[str] = "https://dl.acm.org/doi/10.1145/325334.325242"
    ordered: ClassVar[bool] = True
    count: ClassVar[tuple[int, int | None]] = (2, 2)

    def __post_init__(self) -> None:
        known_scope(self.name, self.scope)
        expect_number("t", self.t)
        if not 0 <= self.t <= 1:
            raise UsageError(f"slerp: t is {self.t}", "give a number from 0, the first adapter, to 1, the second")

    def coefficients(self, gram: torch.Tensor, weights: Sequence[float]) -> list[float]:
        """From the angle; linear where the two lie nearly on one line."""
        _, cosine = cosines(weighted(gram, weights))
        found = between(self.t, cosine[0, 1], parallel=STRAIGHT)
        return [float(each) * weight for each, weight in zip(found, weights, strict=True)]


@hookimpl
def lorahub_methods() -> list[type[Method]]:
    """SLERP."""
    return [Slerp]
