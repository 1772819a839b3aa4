"""The list of like layers that a model is a stack of, and the deeper stack that comes of repeating some of them.

A framework declares the list; what is repeated, an adapter says.  Knows names and numbers; no tensors and no files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from types import MappingProxyType

from lorahub.deltas.kind import JSON

__all__ = ["REPEATED", "LayerList", "Ranges", "Repetition", "as_ranges", "ranges_of", "shown", "twice"]

Ranges = tuple[tuple[int, int], ...]
"""Layers of a base by their numbers, the ends excluded: ((0, 4), (2, 5)) are 0, 1, 2, 3, 2, 3, 4."""

REPEATED = "repeated_layers"
"""The hint under which a format hands on which of its base's layers an adapter's model has, as a list of pairs."""

_DEEPEST, _OFTENEST = 4096, 32
"""Layers of the deepest model that is taken for one, and copies of one layer; files can name any number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerList:
    """Where a model keeps its layers, and what its configuration says of them.

    Attributes:
        path: canonical path of the list ("model.layers"), below which every layer has its number.
        count: the key of ``config.json`` that says how many there are.
        each: key -> a value for each layer, where the configuration tells them apart (``layer_types``).
    """

    path: str
    count: str
    each: Mapping[str, tuple[JSON, ...]] = field(default_factory=lambda: MappingProxyType({}))

    def number(self, name: str) -> int | None:
        """Which layer a parameter is in; None outside of them."""
        rest = name.removeprefix(f"{self.path}.")
        head = rest.partition(".")[0]
        return int(head) if rest != name and head.isdecimal() and head.isascii() else None

    def depth(self, names: Iterable[str]) -> int:
        """How many layers there are, by the highest number."""
        return 1 + max((number for name in names if (number := self.number(name)) is not None), default=-1)

    def renumbered(self, name: str, number: int) -> str:
        """The same parameter of another layer."""
        return f"{self.path}.{number}.{name.removeprefix(f'{self.path}.').partition('.')[2]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Repetition:
    """How a deeper model's layers come from its base's.

    Attributes:
        layers: the list.
        ranges: as they were asked for.
        sources: for every layer of the result, the base's.
        places: for every layer of the base that is in it, where.
        depth: how many layers the base has.
        left_out: names in the base's files whose place in the result is another layer's, or nobody's.
    """

    layers: LayerList
    ranges: Ranges
    sources: tuple[int, ...]
    places: Mapping[int, tuple[int, ...]]
    depth: int
    left_out: tuple[str, ...]

    def origin(self, name: str) -> str:
        """The base's parameter from which this one of the result is made."""
        number = self.layers.number(name)
        return name if number is None else self.layers.renumbered(name, self.sources[number])

    def copies(self, name: str) -> tuple[str, ...]:
        """All parameters of the result that are made from the same one, itself among them."""
        number = self.layers.number(name)
        if number is None:
            return (name,)
        return tuple(self.layers.renumbered(name, at) for at in self.places[self.sources[number]])

    def spelled(self, name: str, stored: str) -> str:
        """The name in the result's files, from the one that its origin has (or would have) in the base's."""
        number = self.layers.number(name)
        if number is None:
            return stored
        parts = stored.split(".")
        at = parts.index(str(self.sources[number]))  # the first number, as nothing around the layers is numbered
        return ".".join([*parts[:at], str(number), *parts[at + 1 :]])

    def config(self) -> dict[str, JSON]:
        """What ``config.json`` says of the result's layers."""
        each: dict[str, JSON] = {
            key: [values[number] for number in self.sources] for key, values in self.layers.each.items()
        }
        return {self.layers.count: len(self.sources), **each}


def as_ranges(value: JSON) -> Ranges:
    """Pairs of numbers as ranges of layers.

    Raises:
        ValueError: they are something else, or ranges of no layers; the message says what, to follow the value.
    """
    if not isinstance(value, list) or not value:
        raise ValueError("is no list of [start, end] pairs")
    ranges: list[tuple[int, int]] = []
    for pair in value:
        whole = isinstance(pair, list) and all(isinstance(each, int) and not isinstance(each, bool) for each in pair)
        if not isinstance(pair, list) or len(pair) != 2 or not whole:
            raise ValueError("is no list of [start, end] pairs")
        start, stop = (int(each) for each in pair if isinstance(each, int))
        if not 0 <= start < stop:
            raise ValueError(f"has [{start}, {stop}], which is no range of layers: starts at 0 or later, ends after it")
        ranges.append((start, stop))
    if (total := sum(stop - start for start, stop in ranges)) > _DEEPEST:
        raise ValueError(f"asks for {total} layers, and no model is known to have more than {_DEEPEST}")
    counts = Counter(number for start, stop in ranges for number in range(start, stop))
    number, count = counts.most_common(1)[0]
    if count > _OFTENEST:
        raise ValueError(f"has layer {number} {count} times, and more than {_OFTENEST} copies are no model's")
    return tuple(ranges)


def ranges_of(hints: Mapping[str, JSON]) -> Ranges:
    """Which of its base's layers an adapter's model has; none where it is the base's own."""
    value = hints.get(REPEATED)
    return as_ranges(value) if value is not None else ()


def twice(ranges: Ranges) -> bool:
    """Whether some layer is in it more than once."""
    return any(start < end for (_, end), (start, _) in pairwise(sorted(ranges)))


def shown(ranges: Iterable[tuple[int, int]]) -> str:
    """``0-3, 2-4``, for people."""
    return ", ".join(f"{start}-{stop - 1}" if stop > start + 1 else str(start) for start, stop in ranges)
