"""Factors of a linear layer beside a convolution, and those of a pointwise convolution beside a linear layer.

Trainers treat the two alike where the base of one release has the first and that of another the second, and some store
a convolution's first factor flattened, ``[r, in * prod(k)]``.  Where the sizes agree with the base's weight the factors
take its number of axes; where they do not, they stay, and the check against the base says what is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from lorahub.bases.index import BaseIndex
from lorahub.bases.layout import Target
from lorahub.deltas.kind import Group, TensorRef

__all__ = ["fit_factors"]

_KINDS = frozenset({"dora", "lora"})


def fit_factors(group: Group, index: BaseIndex | None) -> Group:
    """The group with factors that have as many axes as the base's weight."""
    name = Target(group.component, group.module, group.parameter).name
    if index is None or group.kind not in _KINDS or group.role or name not in index.parameters:
        return group
    down, up = group.slots["down"], group.slots["up"]
    slots = _shaped(down, up, index.parameters[name].shape)
    return group if slots is None else replace(group, slots={**group.slots, **slots})


def _shaped(down: TensorRef, up: TensorRef, weight: tuple[int, ...]) -> Mapping[str, TensorRef] | None:
    rank, kernel = down.shape[0], weight[2:]
    if len(weight) < 2 or len(down.shape) == len(weight):
        return None
    if len(down.shape) == 2 and down.shape[1] == math.prod(weight[1:]):
        return _refs(down, up, (rank, *weight[1:]), (up.shape[0], rank, *(1 for _ in kernel)))
    if len(weight) == 2 and math.prod(down.shape[2:]) == 1:
        return _refs(down, up, down.shape[:2], up.shape[:2])
    return None


def _refs(down: TensorRef, up: TensorRef, first: tuple[int, ...], second: tuple[int, ...]) -> Mapping[str, TensorRef]:
    return {"down": replace(down, shape=first, reshaped=True), "up": replace(up, shape=second, reshaped=True)}
