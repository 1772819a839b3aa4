"""A stack of matrices, one for each expert of a mixture, kept as one matrix: two ways, both PEFT's.

``rows``: the matrices lie one below the other, [E * r, in], all rows of an expert together.  ``columns``: they are
woven, [out, r * E], the expert changing fastest.  ``shared``: one matrix, [1, ...], stands for all.  Sizes and memory
only; what the matrices mean, the kinds say.
"""

from __future__ import annotations

from lorahub.lazy import torch

__all__ = ["COLUMNS", "ROWS", "SHARED", "stack", "stacked_shape", "unstack"]

ROWS, COLUMNS, SHARED = "rows", "columns", "shared"


def unstack(matrix: torch.Tensor, way: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The matrices in ``matrix`` as a tensor of ``shape``, [E, r, in] or [E, out, r]."""
    experts, first, second = shape
    if way == SHARED:
        return matrix.expand(shape)
    if way == ROWS:
        return matrix.reshape(experts, first, second)
    return matrix.reshape(first, second, experts).permute(2, 0, 1)


def stack(matrices: torch.Tensor, way: str) -> torch.Tensor:
    """The inverse of ``unstack``: [E * r, in] from [E, r, in], or [out, r * E] from [E, out, r]."""
    if way == ROWS:
        return matrices.reshape(-1, matrices.shape[2])
    return matrices.permute(1, 2, 0).reshape(matrices.shape[1], -1)


def stacked_shape(found: tuple[int, ...], way: str, experts: int) -> tuple[int, ...] | None:
    """The shape that a stored matrix of shape ``found`` has as a stack, or None where it does not divide up."""
    if len(found) != 2 or experts < 1 or found[0 if way == ROWS else 1] % experts:
        return None
    if way == ROWS:
        return (experts, found[0] // experts, found[1])
    return (experts, found[0], found[1] // experts)
