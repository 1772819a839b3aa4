"""Norms and cosines out of inner products, and the two ways to interpolate along a great circle.

What the methods on spheres have in common.  Knows numbers; no factors and no weights of a model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

from lorahub.errors import UsageError
from lorahub.lazy import torch

__all__ = ["PARALLEL", "Scope", "between", "cosines", "known_scope", "shares", "weighted"]

Scope: TypeAlias = Literal["target", "adapter"]
"""Of what the angles are: of the changes of one target each, or of whole adapters."""

PARALLEL = 1e-12
"""Squared sines up to this are the rounding of a float64 cosine: the two lie on one line."""


def known_scope(method: str, scope: str) -> None:
    """Refuse any other scope.

    Raises:
        UsageError: it is neither "target" nor "adapter".
    """
    if scope not in ("target", "adapter"):
        raise UsageError(f"{method}: there is no scope '{scope}'", "choose target, or adapter")


def weighted(gram: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
    """Inner products [..., n, n] of the changes, each times its weight."""
    each = torch.tensor(list(weights), dtype=torch.float64)
    return gram * torch.outer(each, each)


def cosines(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Norms [..., n] and cosines [..., n, n] of vectors with these inner products; 0 for every one of a zero vector."""
    norms = gram.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    products = norms[..., :, None] * norms[..., None, :]
    found = torch.where(products > 0, gram / torch.where(products > 0, products, 1.0), 0.0)
    return norms, found.clamp(-1, 1)


def between(t: float, cosine: torch.Tensor, *, parallel: float) -> tuple[torch.Tensor, torch.Tensor]:
    """What the ends of an arc are multiplied with at ``t`` of the way along it (Shoemake, 1985).

    Args:
        t: 0 is the first end, 1 the second.
        cosine: of the angle between the ends, any shape.
        parallel: squared sines up to this are no arc: there both ends count linearly.

    Returns:
        Two tensors of ``cosine``'s shape.
    """
    straight = 1 - cosine**2 <= parallel
    angle = torch.where(straight, 0.0, cosine).acos()
    sine = angle.sin()
    first = torch.where(straight, torch.full_like(cosine, 1 - t), ((1 - t) * angle).sin() / sine)
    second = torch.where(straight, torch.full_like(cosine, t), (t * angle).sin() / sine)
    return first, second


def shares(method: str, weights: Sequence[float]) -> list[float]:
    """Weights divided by their sum; zeros where all are zero.

    Raises:
        UsageError: weights that are not zero sum to zero.
    """
    total = math.fsum(weights)
    if not any(weights):
        return [0.0 for _ in weights]
    if abs(total) <= 1e-12 * max(map(abs, weights)):
        raise UsageError(
            f"{method}: weights that sum to zero name no point between the adapters",
            "change the weights; linear takes any",
        )
    return [weight / total for weight in weights]
