"""How two changes lie to each other, from their factors: inner product, norms, angles; nothing of size [out, in].

``<s B A, t D C> = s t sum((B^T D) * (A C^T))``, and what a difference or an angle needs lies in the QR bases
of the factors.  Float64 on one thread.  Changes without factors are compared as the dense tensors they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lorahub.composition.algebra.truncate import one_thread, singular_values
from lorahub.deltas.delta import LowRank
from lorahub.lazy import torch

__all__ = ["Relation", "directions", "gram_matrix", "principal_angles", "relate", "relate_dense"]

_COUNTS = 1e-12
"""Singular values below this share of the largest are the rounding of float64, and no direction of the change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Relation:
    """Two changes to one parameter, beside each other.

    Attributes:
        norms: Frobenius norms of the two.
        inner: their inner product.
        difference: the Frobenius norm of one minus the other.
        ranks: how many directions each has; empty for dense changes.
        angles_out: principal angles between the spaces they write to, radians, ascending; empty for dense changes.
        angles_in: principal angles between the spaces they read from.
    """

    norms: tuple[float, float]
    inner: float
    difference: float
    ranks: tuple[int, ...] = ()
    angles_out: tuple[float, ...] = ()
    angles_in: tuple[float, ...] = ()

    @property
    def cosine(self) -> float | None:
        """Of the angle between the two as vectors; None where one of them is zero."""
        product = self.norms[0] * self.norms[1]
        return max(-1.0, min(1.0, self.inner / product)) if product else None

    @property
    def relative(self) -> float:
        """The difference over the larger of the two norms; 0 where both are zero."""
        larger = max(self.norms)
        return self.difference / larger if larger else 0.0


def gram_matrix(changes: Sequence[LowRank]) -> torch.Tensor:
    """All inner products of changes to one parameter: [n, n], float64, symmetric to the last bit."""
    with one_thread():
        wide = [(each.up.double(), each.down.double(), each.scale) for each in changes]
        result = torch.zeros(len(wide), len(wide), dtype=torch.float64)
        for row, (up, down, scale) in enumerate(wide):
            for column, (other_up, other_down, other_scale) in enumerate(wide[: row + 1]):
                product = float(((up.mT @ other_up) * (down @ other_down.mT)).sum()) * scale * other_scale
                result[row, column] = result[column, row] = product
        return result


def relate(one: LowRank, other: LowRank) -> Relation:
    """Compare two changes by their factors; they must be of one shape.

    The difference is the norm of the core of both pairs side by side, so that it is as exact for changes that are
    almost equal as for others.
    """
    with one_thread():
        grams = gram_matrix([one, other])
        up = torch.cat([one.up.double() * one.scale, other.up.double() * -other.scale], dim=1)
        down = torch.cat([one.down.double(), other.down.double()])
        bases = [directions(each) for each in (one, other)]
        (out_one, in_one), (out_other, in_other) = bases
        return Relation(
            norms=(math.sqrt(max(float(grams[0, 0]), 0.0)), math.sqrt(max(float(grams[1, 1]), 0.0))),
            inner=float(grams[0, 1]),
            difference=float(singular_values(up, down, 1.0).norm()),
            ranks=(out_one.shape[1], out_other.shape[1]),
            angles_out=principal_angles(out_one, out_other),
            angles_in=principal_angles(in_one, in_other),
        )


def relate_dense(one: torch.Tensor, other: torch.Tensor) -> Relation:
    """Compare two changes element by element."""
    with one_thread():
        one, other = one.double(), other.double()
        return Relation(
            norms=(float(one.norm()), float(other.norm())),
            inner=float((one * other).sum()),
            difference=float((one - other).norm()),
        )


def principal_angles(one: torch.Tensor, other: torch.Tensor) -> tuple[float, ...]:
    """The angles between two subspaces, radians, ascending; as many as the smaller one has dimensions.

    Small angles come from their sines: a cosine near 1 says nothing of them (Bjorck and Golub, 1973).

    Args:
        one: orthonormal columns.
        other: orthonormal columns of the same length.
    """
    if one.shape[1] < other.shape[1]:
        one, other = other, one
    if not other.shape[1]:
        return ()
    with one_thread():
        inside = one.mT @ other
        cosines = torch.linalg.svdvals(inside).clamp(max=1.0)
        sines = torch.linalg.svdvals(other - one @ inside).flip(0).clamp(max=1.0)
        angles = torch.where(cosines**2 < 0.5, cosines.acos(), sines.asin())
        return tuple(float(angle) for angle in angles)


def directions(change: LowRank) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormal columns: of the space a change writes to, and of the one it reads from, by descending energy."""
    left, r_up = torch.linalg.qr(change.up.double())
    right, r_down = torch.linalg.qr(change.down.double().mT)
    u, s, vh = torch.linalg.svd(r_up @ r_down.mT, full_matrices=False)
    count = int((s > _COUNTS * s[:1]).sum()) if float(s.sum()) and change.scale else 0
    return left @ u[:, :count], right @ vh[:count].mT
