"""Parts of a weight that its singular values single out: what the kinds that take a weight apart have in common.

Every function gives a product of factors, which is the same whatever signs a library chooses for singular vectors; only
where two singular values on either side of a cut are equal does the part depend on the library.  Computed in the
weight's own dtype, as PEFT does in float32.  Knows tensors and sizes; no kinds, no files.
"""

from __future__ import annotations

from typing import TypeAlias

from lorahub.deltas.delta import ALL, Index
from lorahub.errors import BaseMismatch, NotFinite, NotLocal
from lorahub.lazy import torch

__all__ = ["Factors", "expect_finite", "expect_sizes", "first_of_qr", "largest", "smallest", "whole_only"]

Factors: TypeAlias = "tuple[torch.Tensor, torch.Tensor]"
"""``up`` [out, n] and ``down`` [n, in], whose product is the part."""


def largest(weight: torch.Tensor, n: int) -> Factors:
    """The best approximation of rank ``n``: the n largest singular values, the root of each on either side."""
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    root = s[:n].sqrt()
    return u[:, :n] * root, root[:, None] * vh[:n]


def smallest(weight: torch.Tensor, n: int) -> Factors:
    """What that approximation leaves out: the n smallest singular values of min(out, in), on the side of ``up``."""
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    first = s.shape[0] - n
    return u[:, first:] * s[first:], vh[first:]


def first_of_qr(weight: torch.Tensor, n: int) -> Factors:
    """The first n columns of Q and rows of R, where ``weight`` is their product."""
    q, r = torch.linalg.qr(weight)
    return q[:, :n], r[:n]


def expect_sizes(kind: str, weight: torch.Tensor, out: int, inputs: int, most: int = 0) -> None:
    """Refuse a weight that is not [out, in], whose smaller side is less than ``most``, or that is not finite.

    Raises:
        BaseMismatch: naming both shapes.
        NotFinite: see ``expect_finite``.
    """
    if tuple(weight.shape) != (out, inputs):
        raise BaseMismatch(f"a {kind} delta for {[out, inputs]} was given a weight {list(weight.shape)}")
    if min(out, inputs) < most:
        raise BaseMismatch(f"a {kind} delta of rank {most} was given a weight {list(weight.shape)}, which has no such")
    expect_finite(kind, weight)


def expect_finite(kind: str, weight: torch.Tensor) -> None:
    """Refuse a weight with NaN or infinity, which no decomposition ends with.

    Raises:
        NotFinite: it has some.
    """
    if not bool(torch.isfinite(weight).all()):
        raise NotFinite(f"a {kind} delta takes its weight apart, and a weight {list(weight.shape)} is not finite")


def whole_only(kind: str, rows: Index, cols: Index) -> None:
    """Refuse any cut: a part of a weight has other singular values than the whole.

    Raises:
        NotLocal: the region is not everything.
    """
    if rows != ALL or cols != ALL:
        raise NotLocal(f"a {kind} delta takes the whole weight apart; it cannot be cut")
