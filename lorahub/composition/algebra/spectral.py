"""Singular vectors of changes of low rank, from their factors; nothing of size [out, in] is made.

Only singular values that count are kept, so a rank here is that of the change and not of its file.  Where a rule looks
at single elements, the vectors themselves must be determined: ``canonical`` makes them so even where singular values
are equal.  Float64; callers see to the one thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lorahub.errors import NotFinite
from lorahub.lazy import torch

__all__ = ["COUNTS", "Singular", "canonical", "polar", "singular", "span"]

COUNTS = 1e-12
"""Singular values below this share of the largest are the rounding of float64, and no direction."""

EQUAL = 1e-9
"""Singular values nearer to each other than this share of the largest have no vectors of their own, but a space."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Singular:
    """``u @ diag(values) @ v^T``.

    Attributes:
        u: orthonormal columns, [out, k], float64.
        values: descending, all of them counting, [k], float64.
        v: orthonormal columns, [in, k], float64.
    """

    u: torch.Tensor
    values: torch.Tensor
    v: torch.Tensor

    def __len__(self) -> int:
        """The rank."""
        return len(self.values)

    def cut(self, rank: int) -> Singular:
        """The first ``rank`` of it."""
        return Singular(u=self.u[:, :rank], values=self.values[:rank], v=self.v[:, :rank])


def singular(up: torch.Tensor, down: torch.Tensor, scale: float, *, beside: float = 0.0) -> Singular:
    """The singular values and vectors of ``scale * up @ down``.

    Args:
        up: [out, r], any floating dtype.
        down: [r, in].
        scale: multiplies the product.
        beside: the largest singular value of what this is a part of: what is rounding there does not count here.

    Raises:
        NotFinite: NaN or infinity in the factors.
    """
    left, r_up = torch.linalg.qr(up.double())
    right, r_down = torch.linalg.qr(down.double().mT)
    u, values, vh = torch.linalg.svd(_finite((r_up @ r_down.mT) * scale), full_matrices=False)
    count = _counting(values, beside)
    return Singular(u=left @ u[:, :count], values=values[:count], v=right @ vh[:count].mT)


def span(ups: Sequence[torch.Tensor], downs: Sequence[torch.Tensor]) -> torch.Tensor:
    """Left singular vectors of ``[up_1 @ down_1 | up_2 @ down_2 | ...]``, canonical: [out, k], k the joint rank.

    They depend on the products alone: other factors of the same changes give the same vectors.

    Args:
        ups: [out, r_i] each, float64.
        downs: [r_i, in] each, float64.

    Raises:
        NotFinite: NaN or infinity in the factors.
    """
    basis, triangle = torch.linalg.qr(torch.cat(list(ups), dim=1))
    pieces = triangle.split([up.shape[1] for up in ups], dim=1)
    wide = [piece @ torch.linalg.qr(down.mT, mode="r").R.mT for piece, down in zip(pieces, downs, strict=True)]
    u, values, _ = torch.linalg.svd(_finite(torch.cat(wide, dim=1)), full_matrices=False)
    count = _counting(values)
    return canonical(basis @ u[:, :count], values[:count])


def canonical(columns: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Singular vectors whose signs, and whose choice among equal values, follow from what they span.

    The largest entry of each is positive.  The vectors of equal values are replaced by others of the same space: the
    coordinate axis nearest to that space, projected onto it; then the axis nearest to what is left of it; and so on.
    Of axes equally near, the first counts.

    Args:
        columns: orthonormal, [m, k].
        values: descending, [k].

    Returns:
        Orthonormal columns, [m, k], a new tensor.
    """
    if not columns.numel():
        return columns.clone()
    result = columns * columns.gather(0, _first_largest(columns.abs())[None, :]).sign()
    apart = (values[:-1] - values[1:] > EQUAL * values[:1]).nonzero().flatten() + 1
    ends = [*apart.tolist(), len(values)]
    for start, end in zip([0, *ends], ends, strict=False):
        block = columns[:, start:end]
        for number in range(start, end) if end > start + 1 else ():
            lengths = torch.linalg.vector_norm(block, dim=1)
            axis = int(_first_largest(lengths))
            direction = block[axis] / lengths[axis]
            result[:, number] = block @ direction
            block = block - torch.outer(result[:, number], direction)
    return result


def polar(columns: torch.Tensor) -> torch.Tensor:
    """The nearest orthonormal columns, ``columns (columns^T columns)^(-1/2)``; [m, k].

    Where columns depend on each other there are none.  Then the result is the partial isometry of the same span and
    rank: no direction is made up.
    """
    u, values, vh = torch.linalg.svd(columns, full_matrices=False)
    count = _counting(values)
    nearest: torch.Tensor = u[:, :count] @ vh[:count]
    return nearest


def _first_largest(lengths: torch.Tensor) -> torch.Tensor:
    """Where along axis 0 the largest is; the first of those that differ from it by rounding."""
    first: torch.Tensor = (lengths >= lengths.amax(0) * (1 - EQUAL)).to(torch.uint8).argmax(0)
    return first


def _counting(values: torch.Tensor, beside: float = 0.0) -> int:
    if not values.numel():
        return 0
    largest = max(float(values[0]), beside)
    return int((values > COUNTS * largest).sum()) if largest else 0


def _finite(core: torch.Tensor) -> torch.Tensor:
    if not torch.isfinite(core).all():
        raise NotFinite("NaN or infinity in the factors of a change", "its training diverged, or it is damaged")
    return core
