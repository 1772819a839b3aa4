"""Rotations of a weight's inputs, block by block: what OFT, BOFT and their like have in common.

A rotation is near the identity, so functions give the difference from it: a rotation by nothing then changes exactly
nothing, and a small one loses no digits.  Knows tensors and sizes; no files and no configs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from lorahub.deltas.delta import ALL, Index
from lorahub.errors import BaseMismatch, NotLocal
from lorahub.lazy import torch

__all__ = ["all_columns", "block_size", "blockwise", "cayley", "neumann", "number_of_blocks", "skew"]


def block_size(numbers: int) -> int | None:
    """``b`` with ``b * (b - 1) / 2 == numbers``, or None."""
    b = (1 + math.isqrt(1 + 8 * numbers)) // 2
    return b if b * (b - 1) // 2 == numbers else None


def number_of_blocks(features: int, wanted: int) -> int:
    """The largest number up to ``wanted`` of equal blocks, none narrower than 2, that ``features`` fall into.

    Raises:
        BaseMismatch: there is nothing to rotate in one dimension.
    """
    if features < 2:
        raise BaseMismatch("a rotation needs at least two inputs")
    return next(n for n in range(max(1, min(wanted, features // 2)), 0, -1) if features % n == 0)


def skew(angles: torch.Tensor, b: int) -> torch.Tensor:
    """Skew-symmetric blocks ``[n, b, b]`` from their upper triangles ``[n, b * (b - 1) / 2]``, row by row."""
    rows, cols = torch.triu_indices(b, b, 1, device=angles.device)
    upper = angles.new_zeros(angles.shape[0], b, b)
    upper[:, rows, cols] = angles
    return upper - upper.transpose(1, 2)


def cayley(q: torch.Tensor) -> torch.Tensor:
    """``(I - Q) (I + Q)^-1 - I`` of skew-symmetric blocks, which is ``-2 Q (I + Q)^-1``."""
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    change: torch.Tensor = torch.linalg.solve(eye + q, -2 * q, left=False)
    return change


def neumann(q: torch.Tensor, series: Sequence[float]) -> torch.Tensor:
    """``series[0] Q + series[1] Q^2 + ...``, the identity left out."""
    change, power = torch.zeros_like(q), q
    for at, coefficient in enumerate(series):
        power = power @ q if at else q
        change = change + coefficient * power
    return change


def blockwise(flat: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """``flat`` ``[m, n * b]`` times the block-diagonal matrix of ``blocks`` ``[n, b, b]``; one block serves for all.

    Raises:
        BaseMismatch: the blocks do not add up to the columns.
    """
    n, b = blocks.shape[:2]
    if flat.shape[1] != n * b and not (n == 1 and flat.shape[1] % b == 0):
        raise BaseMismatch(f"{n} blocks of {b} were given a weight with {flat.shape[1]} inputs")
    parts = flat.reshape(flat.shape[0], -1, b)
    return torch.einsum("mnb,nbc->mnc", parts, blocks.expand(parts.shape[1], b, b)).reshape(flat.shape)


def all_columns(kind: str, cols: Index) -> None:
    """Refuse any cut of the columns: a rotation mixes the inputs.

    Raises:
        NotLocal: ``cols`` is not everything.
    """
    if cols != ALL:
        raise NotLocal(f"a {kind} delta mixes the inputs of a weight; it cannot be cut across them")
