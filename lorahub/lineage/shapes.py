"""What a base looks like by the shapes of an adapter's modules; shapes tell an architecture and no more."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import lru_cache, reduce
from operator import attrgetter, or_
from typing import TypeAlias

from lorahub.lineage.architectures import LAYERED, ROWS, Row
from lorahub.lineage.guesses import Guess
from lorahub.lineage.modules import Module, first_of

__all__ = ["Pick", "by_shape"]

Pick: TypeAlias = "Callable[[Iterable[Module]], Module | None]"

_PATH, _INPUTS = attrgetter("path"), attrgetter("inputs")


def by_shape(modules: Sequence[Module], pick: Pick) -> Guess | None:
    """What the modules look like, or None; ``pick`` chooses the one that is named as evidence."""
    shown = reduce(or_, set(map(_shown, map(_PATH, modules))), 0)
    widths = set(map(_INPUTS, modules))
    for row, having, lacking in _BITS:
        if shown & having != having or shown & lacking or (row.widths and widths.isdisjoint(row.widths)):
            continue
        if module := _fits(row, modules, pick):
            inputs = f"{module.inputs} inputs to " if row.widths else "there is "
            return Guess(
                label=f"{row.name}-shaped",
                architecture=row.name,
                source="shapes",
                evidence=f"{inputs}{module.path}",
            )
    return _layered(modules)


_PARTS = tuple(dict.fromkeys(part for row in ROWS for part in (*row.having, *row.lacking)))


def _bits(parts: Collection[str]) -> int:
    return sum(1 << at for at, part in enumerate(_PARTS) if part in parts)


_BITS = tuple((row, _bits(row.having), _bits(row.lacking)) for row in ROWS)
"""Each row with what must occur in some path, and what must not, as bits."""


@lru_cache(maxsize=1 << 15)  # the modules of some thirty bases
def _shown(path: str) -> int:
    """Which parts occur in a path, as bits."""
    return sum(1 << at for at, part in enumerate(_PARTS) if part in path)


def _fits(row: Row, modules: Sequence[Module], pick: Pick) -> Module | None:
    """A module that shows it, or None, where what must occur does and the rest does not."""
    if row.beyond and max((_number(module.path, row.having[0]) for module in modules), default=-1) < row.beyond:
        return None
    return pick(
        module
        for module in modules
        if (not row.widths or module.inputs in row.widths)
        and (not row.ends or module.path.endswith(row.ends))
        and (row.ends or not row.having or row.having[0] in module.path)
        and (not row.dotted or module.place[1].endswith(row.dotted))
    )


def _number(path: str, before: str) -> int:
    """The number right behind ``before`` in a path, or -1."""
    head = path.partition(before)[2].partition("_")[0]
    return int(head) if head.isdecimal() and len(head) < 6 else -1


@lru_cache(maxsize=1 << 15)  # the modules of some thirty bases
def _highest(path: str) -> int:
    """The highest number among the parts of a path, or -1."""
    return max((int(part) for part in path.split("_") if part.isdecimal() and len(part) < 6), default=-1)


def _layered(modules: Sequence[Module]) -> Guess | None:
    """A transformer that only its width and its number of layers tell from others."""
    for what, ends, sizes in LAYERED:
        own = [module for module in modules if module.path.endswith(ends) and module.inputs is not None]
        first = first_of(own)
        if first is None:
            continue
        width = first.inputs
        layers = max(map(_highest, map(_PATH, own))) + 1
        like = sizes.get((width or 0, layers), "")
        label = f"{what}-shaped: {width} wide, {layers} layers" + (f", as {like}" if like else "")
        return Guess(label=label, architecture=what, source="shapes", evidence=f"{width} inputs to {first.path}")
    return None
