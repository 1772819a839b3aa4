"""The modules that an adapter changes, as far as they tell a base: their names, flat, and how many inputs they have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from itertools import repeat, starmap
from operator import itemgetter
from typing import NamedTuple

from lorahub.deltas.kind import Group, Kind
from lorahub.formats.families import Groups, by_module
from lorahub.shapes import Binding, ShapeMisfit, unify

__all__ = ["Module", "first_of", "modules_of"]


class Module(NamedTuple):
    """A module that changes.

    Attributes:
        path: with underscores for dots, component in front.
        inputs: how many it has, or None.
        place: component and module, and its place among all; what orders it.
    """

    path: str
    inputs: int | None
    place: tuple[str, str, int] = ("", "", 0)


_made = partial(tuple.__new__, Module)
"""A module from its three fields: ``Module._make`` without the check that there are three."""

_NAMED = itemgetter(0, 1)


def modules_of(groups: Sequence[Group], kinds: Mapping[str, Kind]) -> tuple[Module, ...]:
    """The modules that change, in any order, with their numbers of inputs where the tensors tell."""
    found: list[Module] = []
    if not isinstance(groups, Groups) or groups.apart:
        for at, group in enumerate(groups):
            place = (group.component, group.module, at)
            found.append(Module(_path(group.component, group.module), _inputs(group, kinds[group.kind]), place))
    else:
        for family in groups.families:
            inputs = _inputs(family.like.group, kinds[family.like.group.kind])
            placed = groups.modules(family)
            paths = starmap(_path, map(_NAMED, placed))
            found += map(_made, zip(paths, repeat(inputs), placed))
    return tuple(found)


@lru_cache(maxsize=1 << 15)  # the modules of some thirty bases
def _path(component: str, module: str) -> str:
    return f"{component}_{module}".replace(".", "_").lstrip("_")


def _inputs(group: Group, kind: Kind) -> int | None:
    touch = next(iter(kind.touches(group)), None)
    dims = touch.dims.split() if touch else []
    if touch is None or len(dims) < 2:
        return None
    if dims[1].removeprefix("*").isdigit():  # with a star: times the sizes of a kernel, where there is one
        return int(dims[1].removeprefix("*"))
    bound: Binding = {}
    with suppress(ShapeMisfit, StopIteration):
        for slot in touch.slots:
            if slot in group.slots:
                bound = unify(kind.slot(slot).dims, group.slots[slot].shape, bound, name=slot)
    found = bound.get(dims[1].lstrip("*"))
    if isinstance(found, tuple):
        found = found[0] if found else None
    return found


def first_of(modules: Iterable[Module]) -> Module | None:
    """The first in natural order."""
    return min(modules, key=lambda each: (by_module(*each.place[:2]), each.place[2]), default=None)
