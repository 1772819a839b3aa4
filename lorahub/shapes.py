"""Shapes declared as text and checked from headers alone.

A pattern is a list of dimensions separated by blanks: ``"out r *1"``.  A name stands for one size, the same
everywhere in one binding; a number stands for itself; ``*k`` stands for any number of trailing sizes, the same
everywhere; ``*1`` stands for any number of trailing ones, another number, as in ``*54``, for trailing sizes with that
product, ``*%6`` for trailing sizes whose product is a multiple of it, and ``*<6`` for trailing sizes the smallest of
which it is; ``%4`` stands for one size that is a multiple of 4, ``>7`` for one that is at least 7, and ``>in`` for one
that is at least the one called ``in``, where that is known.  Sizes, dimensions and names only: no tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import TypeAlias

__all__ = ["Binding", "ShapeMisfit", "bind", "instantiate", "unify"]

Binding: TypeAlias = "dict[str, int | tuple[int, ...]]"


class ShapeMisfit(ValueError):
    """A shape that does not fit its pattern; the message names both sizes.  Callers turn it into a finding."""


def unify(pattern: str, shape: Sequence[int], bound: Mapping[str, int | tuple[int, ...]], *, name: str) -> Binding:
    """Match ``shape`` against ``pattern`` under ``bound`` and return the larger binding.

    Args:
        pattern: such as ``"r in *k"``.
        shape: the sizes found.
        bound: sizes already known; not changed.
        name: what the shape belongs to, for the message.

    Raises:
        ShapeMisfit: with the pattern, the shape, and the two sizes that disagree.
    """
    dims = pattern.split()
    rest = dims.pop() if dims and dims[-1].startswith("*") else None
    found = tuple(shape)
    if len(found) < len(dims) or (rest is None and len(found) != len(dims)):
        raise ShapeMisfit(f"{name} {list(found)} does not fit [{pattern}]: {len(found)} dimensions")
    result: Binding = dict(bound)
    for dim, size in zip(dims, found, strict=False):
        if dim.startswith("%"):
            if size % int(dim[1:]):
                raise ShapeMisfit(f"{name} {list(found)} does not fit [{pattern}]: {size} is no multiple of {dim[1:]}")
        elif dim.startswith(">"):
            least = int(dim[1:]) if dim[1:].isdigit() else bound.get(dim[1:])
            if isinstance(least, int) and size < least:
                raise ShapeMisfit(f"{name} {list(found)} does not fit [{pattern}]: {least} is the least, {size} found")
        elif dim.isdigit():
            if int(dim) != size:
                raise ShapeMisfit(f"{name} {list(found)} does not fit [{pattern}]: {dim} was expected, {size} found")
        elif (expected := result.setdefault(dim, size)) != size:
            raise ShapeMisfit(
                f"{name} {list(found)} does not fit [{pattern}]: {dim} is {expected} elsewhere, {size} here"
            )
    tail = found[len(dims) :]
    if rest == "*1":
        if any(size != 1 for size in tail):
            raise ShapeMisfit(f"{name} {list(found)} does not fit [{pattern}]: trailing sizes must be 1")
    elif rest is not None and rest.startswith("*<"):
        if min(tail, default=0) != int(rest[2:]):
            raise ShapeMisfit(f"{name} {list(found)} does not fit [{pattern}]: the smallest size must be {rest[2:]}")
    elif rest is not None and rest[1:].removeprefix("%").isdigit():
        _expect_product(rest, tail, f"{name} {list(found)} does not fit [{pattern}]")
    elif rest is not None:
        expected_tail = result.setdefault(rest[1:], tail)
        if expected_tail != tail and not dims:
            raise ShapeMisfit(f"{name} is {list(tail)} where {_listed(expected_tail)} is wanted")
        if expected_tail != tail:
            raise ShapeMisfit(
                f"{name} {list(found)} does not fit [{pattern}]: {rest[1:]} is {expected_tail} elsewhere, {tail} here"
            )
    return result


@lru_cache(maxsize=1 << 12)  # the shapes of a dozen bases under all usual ranks
def bind(slots: tuple[tuple[str, str, tuple[int, ...]], ...]) -> Mapping[str, int | tuple[int, ...]]:
    """The binding of several shapes together.

    Args:
        slots: the name of each, its pattern and the sizes found.

    Raises:
        ShapeMisfit: as ``unify``.
    """
    bound: Binding = {}
    for name, pattern, shape in slots:
        bound = unify(pattern, shape, bound, name=name)
    return MappingProxyType(bound)


def _listed(size: int | tuple[int, ...]) -> list[int]:
    return [size] if isinstance(size, int) else list(size)


def _expect_product(rest: str, tail: tuple[int, ...], says: str) -> None:
    product, wanted = math.prod(tail), int(rest[1:].removeprefix("%"))
    if rest.startswith("*%") and product % wanted:
        raise ShapeMisfit(f"{says}: a multiple of {wanted} was expected, {product} found")
    if not rest.startswith("*%") and product != wanted:
        raise ShapeMisfit(f"{says}: sizes with product {wanted} were expected, with {product} found")


def instantiate(pattern: str, bound: Mapping[str, int | tuple[int, ...]]) -> tuple[int, ...]:
    """The shape that ``pattern`` means under ``bound``; ``*1`` gives as many ones as ``k`` has sizes, ``*54`` one."""
    sizes: list[int] = []
    for dim in pattern.split():
        if dim == "*1":
            k = bound.get("k", ())
            sizes += [1] * (len(k) if isinstance(k, tuple) else 0)
        elif dim[1:].isdigit() and dim.startswith("*"):
            sizes.append(int(dim[1:]))
        elif dim.startswith("*"):
            tail = bound[dim[1:]]
            sizes += list(tail) if isinstance(tail, tuple) else [tail]
        elif dim.isdigit():
            sizes.append(int(dim))
        else:
            size = bound[dim]
            assert isinstance(size, int)
            sizes.append(size)
    return tuple(sizes)
