"""Cuts put off until the weight is there, for kinds whose tensors do not say where a row or a column begins.

A flattened factor ``[r, in * prod(k)]`` tells its columns apart only once a kernel is known, and a Kronecker factor
has no rows of the weight at all.  Such a delta remembers the cuts, in order, and applies them when it sees a weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

from lorahub.deltas.delta import ALL, Index, take
from lorahub.errors import BaseMismatch
from lorahub.lazy import torch

__all__ = ["Cuts", "columns", "counts_from_the_end", "cut", "endless", "positions", "then"]

_ENDLESS = range(2**62)

Cuts: TypeAlias = "tuple[Index, ...]"
"""Cuts along one axis, the first one first; empty: everything."""


def then(cuts: Cuts, index: Index) -> Cuts:
    """``cuts`` and after them ``index``."""
    return cuts if index == ALL else (*cuts, index)


def cut(tensor: torch.Tensor, cuts: Cuts, dim: int) -> torch.Tensor:
    """``tensor`` after all ``cuts`` along ``dim``."""
    for index in cuts:
        tensor = take(tensor, index, dim)
    return tensor


def positions(size: int, cuts: Cuts, device: torch.device) -> torch.Tensor:
    """Which of ``size`` positions are left, in order, as an int64 vector."""
    return cut(torch.arange(size, device=device), cuts, 0)


def columns(flat: torch.Tensor, cuts: Cuts, kernel: tuple[int, ...]) -> torch.Tensor:
    """The inputs that are left of ``flat`` ``[r, in * prod(k)]``, flattened again."""
    if not cuts:
        return flat
    return cut(flat.reshape(flat.shape[0], -1, math.prod(kernel)), cuts, 1).flatten(1)


def counts_from_the_end(index: Index) -> bool:
    """Whether what ``index`` means depends on the size of its axis."""
    if isinstance(index, slice):
        return any(bound is not None and bound < 0 for bound in (index.start, index.stop, index.step))
    return any(at < 0 for at in index)


def endless(cuts: Cuts, count: int, device: torch.device) -> torch.Tensor:
    """Which positions are left of an axis whose size nobody knows, where ``count`` are left of it.

    Raises:
        BaseMismatch: another number is left.
    """
    left: Sequence[int] = _ENDLESS
    for index in cuts:
        left = left[index] if isinstance(index, slice) else [left[at] for at in index]
    if len(left) < count or (len(left) > count and left[-1] < _ENDLESS[-1] // 2):
        raise BaseMismatch(f"a cut that leaves {len(left)} positions was given a weight with {count}")
    return torch.tensor(left[:count], dtype=torch.long, device=device)
