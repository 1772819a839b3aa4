"""Multi-SLERP: the direction half-way between many changes on a sphere, at their mean length, as mergekit has it.

mergekit starts at the normalised mean of the directions, averages them in the tangent space there and goes back.  The
tangent of the mean at itself is zero, so that the second step never moves: the result is the normalised mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from lorahub.composition.algebra.angles import Scope, cosines, known_scope, shares
from lorahub.composition.method import GramMethod, Method
from lorahub.composition.methods.thinning import expect_choice
from lorahub.errors import UsageError
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch

__all__ = ["Multislerp"]

CANCELLED = 1e-7
"""A mean of unit vectors no longer than this is the rounding of its square, and has no direction."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Multislerp(GramMethod):
    """``sum of w_i |d_i|`` times the direction of ``sum of w_i d_i / |d_i|``.

    Attributes:
        normalize_weights: divide the weights by their sum, which makes the length a mean; mergekit's default.
        scope: whose lengths and angles: each target's own, or those of the whole adapters.

    Raises:
        UsageError: a value is out of its range; at use, three or more changes cancel, or weights sum to zero.
    """

    normalize_weights: bool = True
    scope: Scope = "target"

    name: ClassVar[str] = "multislerp"
    title: ClassVar[str] = "Multi-SLERP"
    source: ClassVar[str] = "https://goddard.blog/posts/multislerp-wow-what-a-cool-idea"

    def __post_init__(self) -> None:
        known_scope(self.name, self.scope)
        expect_choice("normalize_weights", self.normalize_weights, (True, False))

    def coefficients(self, gram: torch.Tensor, weights: Sequence[float]) -> list[float]:
        """From norms and cosines; for two changes that cancel the weighted sum, as mergekit does."""
        shared = shares(self.name, weights) if self.normalize_weights else list(weights)
        norms, cosine = cosines(gram)
        units = torch.tensor(shared, dtype=torch.float64) * (norms > 0)
        length = math.sqrt(max(float(units @ cosine @ units), 0.0))
        if not bool(units.any()):
            return [0.0 for _ in weights]
        if length > CANCELLED:
            mean = float((torch.tensor(shared, dtype=torch.float64) * norms).sum())
            return [
                mean / length * unit / norm if norm else 0.0
                for unit, norm in zip(units.tolist(), norms.tolist(), strict=True)
            ]
        if len(weights) == 2:
            return shared
        raise UsageError("multislerp: the changes cancel, so that their mean has no direction", "change the weights")


@hookimpl
def lorahub_methods() -> list[type[Method]]:
    """Multi-SLERP."""
    return [Multislerp]
