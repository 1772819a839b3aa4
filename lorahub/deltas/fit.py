"""What several kinds ask of a weight before they touch it: its shape, and whether a cut leaves a whole axis in place.

Knows sizes and indices only; the arithmetic is each kind's own.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lorahub.errors import BaseMismatch
from lorahub.shapes import Binding, unify

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lorahub.deltas.delta import Delta, Index
    from lorahub.deltas.kind import Group
    from lorahub.lazy import torch

__all__ = ["bind_slots", "covers", "expect_matrix", "expect_shape"]


def expect_shape(delta: Delta, weight: torch.Tensor) -> None:
    """Refuse a weight the delta was not made for, where broadcasting or a reshape would let it pass.

    Raises:
        BaseMismatch: naming both shapes.
    """
    if tuple(weight.shape) != delta.shape():
        raise BaseMismatch(
            f"a {delta.kind} delta for {list(delta.shape() or ())} was given a weight {list(weight.shape)}"
        )


def expect_matrix(kind: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """``(out, in, in * prod(k))`` of a weight ``[out, in, *k]``.

    Raises:
        BaseMismatch: a vector or a scalar, which factors of this kind cannot change.
    """
    if len(shape) < 2:
        raise BaseMismatch(f"a {kind} delta changes weights [out, in, ...], not {list(shape)}")
    return shape[0], shape[1], math.prod(shape[1:])


def covers(index: Index, size: int) -> bool:
    """Whether ``index`` takes every one of ``size`` positions once, in any order."""
    if isinstance(index, slice):
        return len(range(*index.indices(size))) == size
    return len(index) == size and set(index) == set(range(size))


def bind_slots(group: Group, patterns: Mapping[str, str]) -> Binding:
    """The sizes that a group's slots have in common, where their patterns depend on the form the group has.

    Raises:
        ShapeMisfit: they do not fit together.
    """
    bound: Binding = {}
    for slot, pattern in patterns.items():
        bound = unify(pattern, group.slots[slot].shape, bound, name=group.slots[slot].key)
    return bound
