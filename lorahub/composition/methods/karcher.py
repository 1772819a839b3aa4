"""The Karcher mean: the direction whose squared angles to all changes are least, at their mean length.

Gradient descent on the sphere, ``m <- exp_m(mean of log_m(u_i))``, as mergekit has it.  Everything stays in the span of
the changes, so that a direction is n numbers and an inner product one of the Gram matrix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from lorahub.composition.algebra.angles import Scope, cosines, known_scope, shares
from lorahub.composition.method import GramMethod, Method
from lorahub.composition.methods.thinning import expect_number
from lorahub.errors import UsageError
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch

__all__ = ["Karcher"]

OPPOSITE = 1e-6
"""At angles nearer to a half turn than this every direction is as short a way as any other."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Karcher(GramMethod):
    """The weighted mean on the unit sphere, times the weighted mean of the norms; weights are shares.

    Attributes:
        max_iter: steps at most.
        tol: ends when a step turns by less than this angle, radians.
        scope: whose lengths and angles: each target's own, or those of the whole adapters.

    Raises:
        UsageError: a value is out of its range; at use, a negative weight, or changes that cancel.
    """

    max_iter: int = 10
    tol: float = 1e-5
    scope: Scope = "target"

    name: ClassVar[str] = "karcher"
    title: ClassVar[str] = "Karcher mean"
    source: ClassVar[str] = "https://arxiv.org/abs/2603.04972"

    def __post_init__(self) -> None:
        known_scope(self.name, self.scope)
        expect_number("max_iter", self.max_iter, least=1)
        if self.max_iter % 1:
            raise UsageError(f"max_iter is {self.max_iter}", "give a whole number of at least 1")
        expect_number("tol", self.tol, least=0.0, below=1.0)

    def coefficients(self, gram: torch.Tensor, weights: Sequence[float]) -> list[float]:
        """The mean direction as numbers of the changes, and their mean norm."""
        if min(weights) < 0:
            raise UsageError(f"karcher: a weight is {min(weights)}", "a mean takes weights of at least 0")
        shared = torch.tensor(shares(self.name, weights), dtype=torch.float64)
        norms, cosine = cosines(gram)
        there = (norms > 0) & (shared > 0)
        if not bool(there.any()):
            return [0.0 for _ in weights]
        direction = self._mean(cosine, torch.where(there, shared, 0.0) / shared[there].sum())
        length = float((shared * norms).sum())
        return [
            length * part / norm if norm else 0.0 for part, norm in zip(direction.tolist(), norms.tolist(), strict=True)
        ]

    def _mean(self, cosine: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
        """The mean as numbers of the unit vectors whose inner products are ``cosine``."""
        mean = _unit(shared, cosine)
        for _ in range(int(self.max_iter)):
            along = (cosine @ mean).clamp(-1, 1)
            angles = along.acos()
            if bool((angles[shared > 0] > math.pi - OPPOSITE).any()):
                raise _cancelled()
            far = angles >= self.tol
            pulls = torch.where(far, shared * angles / torch.where(far, angles, 1.0).sin(), 0.0)
            tangent = pulls - (pulls @ along) * mean
            turn = math.sqrt(max(float(tangent @ cosine @ tangent), 0.0))
            if turn < self.tol or not turn:
                break
            mean = _unit(math.cos(turn) * mean + (math.sin(turn) / turn) * tangent, cosine)
        return mean


def _unit(vector: torch.Tensor, cosine: torch.Tensor) -> torch.Tensor:
    """The vector at length one.

    Raises:
        UsageError: it has none.
    """
    square = float(vector @ cosine @ vector)
    if square <= OPPOSITE**2:
        raise _cancelled()
    return vector / math.sqrt(square)


def _cancelled() -> UsageError:
    return UsageError("karcher: the changes cancel, so that they have no mean direction", "change the weights")


@hookimpl
def lorahub_methods() -> list[type[Method]]:
    """The Karcher mean."""
    return [Karcher]
