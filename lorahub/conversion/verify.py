"""The proof that what was written does what was read: the change of each target, both ways, in float64.

What was only renamed must be bit-equal.  Everything else is held against the source's own ``delta`` (never against the
closed form it was made by), a band of rows at a time; changes that depend on the weight are compared on the base's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

from lorahub.bases.layout import Target
from lorahub.conversion.change import Change, Origin, Weight
from lorahub.conversion.stacked import expert_of
from lorahub.deltas.delta import ALL, Delta
from lorahub.errors import BaseMismatch, NotLocal
from lorahub.lazy import torch

__all__ = ["UNSEEN", "cost", "difference", "same", "siblings"]

UNSEEN = 1e-6
"""Relative difference above which a rewriting that calls itself exact is refused."""

_BAND = 1 << 22  # numbers held in float64 at a time, of each side


def same(one: Delta, other: Delta) -> bool:
    """Whether two changes are bit-equal: kind, numbers, and every tensor with its dtype."""
    if type(one) is not type(other):
        return False
    pairs = ((getattr(one, each.name), getattr(other, each.name)) for each in fields(one))  # type: ignore[arg-type]  # every delta is a dataclass
    return all(_same(left, right) for left, right in pairs)


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        if left.dtype != right.dtype or left.shape != right.shape:
            return False
        flat = (each.detach().contiguous().view(-1).view(torch.uint8) for each in (left, right))
        return torch.equal(*flat)
    return bool(left == right)


def cost(change: Change, written: Delta) -> int:
    """How many numbers a comparison has to compute; 0 for one of bits."""
    shape = change.extent or written.shape()
    return math.prod(shape) if change.rules and shape else 0


def difference(change: Change, written: Delta, sources: Mapping[Target, Delta], weight: Weight) -> float | None:
    """The relative Frobenius difference of two changes, 0.0 where they are bit-equal; None where it cannot be told.

    Args:
        change: what was meant.
        written: what reads back.
        sources: the source's changes, as they were read.
        weight: the base's weights, for changes that depend on them.
    """
    (first, *more) = change.origins
    source = sources[first.target]
    if not more and first.whole and same(source, written):
        return 0.0
    needed = [written, *(sources[origin.target] for origin in change.origins)]
    bare = all(delta.additive for delta in needed)
    shape = change.extent or written.shape() or source.shape() or _weight_shape(first, weight)
    if shape is None or (not bare and any(weight(origin.target) is None for origin in change.origins)):
        return _tensors(source, written) if not more and first.whole else None
    if any(siblings(sources[origin.target], origin.target, weight) is None for origin in change.origins):
        return None
    try:
        return _relative(_sides(change, written, sources, weight, shape, bare=bare))
    except BaseMismatch:  # a kernel that neither side tells apart from a matrix
        return None


def siblings(delta: Delta, target: Target, weight: Weight) -> dict[str, torch.Tensor] | None:
    """The parameters beside a target that its change reads, or None where one is not at hand."""
    found = {name: weight(replace(target, parameter=name)) for name in delta.reads}
    have = {name: each for name, each in found.items() if each is not None}
    return have if len(have) == len(found) else None


def _weight_shape(origin: Origin, weight: Weight) -> tuple[int, ...] | None:
    found = weight(origin.target)
    return None if found is None else tuple(found.shape)


def _sides(
    change: Change,
    written: Delta,
    sources: Mapping[Target, Delta],
    weight: Weight,
    shape: tuple[int, ...],
    *,
    bare: bool,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(expected, found), a band of rows at a time where both are local."""
    (first, *more) = change.origins
    if not more and first.whole:
        source = sources[first.target]
        whole = None if bare else weight(first.target)
        around = siblings(source, first.target, weight) or {}
        yield from _bands(source, written, shape, whole, around)
        return
    expected, under = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    for origin in change.origins:
        part, own = _part(origin, sources[origin.target], weight, origin.of_parameter.shape(shape), bare=bare)
        origin.of_parameter.put(expected, part)
        origin.of_parameter.put(under, own)
    yield expected, written.delta(under)


def _part(
    origin: Origin, source: Delta, weight: Weight, shape: tuple[int, ...], *, bare: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The part of a source's change that an origin names, and the weight under it."""
    found = None if bare else weight(origin.target)
    own = torch.zeros(shape, dtype=torch.float64) if found is None else origin.of_delta.of(found).contiguous()
    cut = origin.of_delta
    around = siblings(source, origin.target, weight) or {}
    if cut.expert is not None:
        return expert_of(source, cut).delta(own), own
    return (source if cut.whole else source.region(cut.rows, cut.cols)).delta(own, **around), own


def _bands(
    source: Delta,
    written: Delta,
    shape: tuple[int, ...],
    weight: torch.Tensor | None,
    around: Mapping[str, torch.Tensor],
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    rows = shape[0] if shape else 1
    step = max(1, _BAND // max(math.prod(shape[1:]), 1))
    if step < rows and (around or not (_local(source) and _local(written))):
        step = rows
    for start in range(0, rows, step):
        band = slice(start, min(start + step, rows))
        size = (band.stop - start, *shape[1:])
        under = torch.zeros(size if shape else (), dtype=torch.float64) if weight is None else weight[band]
        whole = step >= rows
        one, other = (each if whole else each.region(band, ALL) for each in (source, written))
        yield one.delta(under, **around), other.delta(under)


def _local(delta: Delta) -> bool:
    try:
        delta.region(slice(0, 1), ALL)
    except NotLocal:
        return False
    return True


def _relative(sides: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> float:
    lost = total = 0.0
    for expected, found in sides:
        lost += float((expected - found).square().sum())
        total += float(expected.square().sum())
    return math.sqrt(lost / total) if total else math.inf if lost else 0.0


def _tensors(source: Delta, written: Delta) -> float | None:
    """The largest relative difference among the tensors of two changes of one kind that differ in nothing else."""
    if type(source) is not type(written):
        return None
    numbers = [each.name for each in fields(source) if not isinstance(getattr(source, each.name), torch.Tensor)]  # type: ignore[arg-type]
    if any(getattr(source, name) != getattr(written, name) for name in numbers):
        return None
    ours, theirs = source.tensors(), written.tensors()
    if any(ours[name].shape != theirs[name].shape for name in ours):
        return None
    return max((_relative(iter([(ours[name].double(), theirs[name].double())])) for name in ours), default=0.0)
