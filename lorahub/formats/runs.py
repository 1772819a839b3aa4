"""The keys of one file brought together by module, as columns: those of a module follow each other.

Folders have the same few thousand names over and over, so that a name is taken apart once, however many files have it;
and what all keys of a file need is done to columns, not to one key after another.  Knows no spelling: formats say how a
name is taken apart.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, compress, pairwise
from operator import is_not, itemgetter, ne
from sys import intern
from typing import TypeAlias, final

from lorahub.files.entries import Form

__all__ = ["Runs", "Splits", "Stem", "bring_together", "runs_of"]

Stem: TypeAlias = "tuple[str, str]"
"""What the name of a key says besides its suffix: a part of a pipeline or a prefix, and the module as spelled."""

_MOST = 1 << 16
"""Names remembered: those of some thirty bases, 300 bytes each."""


@final
class Splits:
    """Names taken apart, each once.

    Several threads may share one: what another has thrown away meanwhile is worked out again.

    Args:
        split: name -> stem and suffix; of the name and nothing else.  No suffix: the name is of another form.

    Attributes:
        clash: whether two names were met that say the same.
    """

    __slots__ = ("_known", "_seen", "_split", "_stems", "clash")

    def __init__(self, split: Callable[[str], tuple[Stem, str]]) -> None:
        self._split = split
        self._known: dict[str, tuple[Stem, str]] = {}
        self._stems: dict[Stem, Stem] = {}
        self._seen: dict[tuple[Stem, str], str] = {}
        self.clash = False

    def of(self, names: Iterable[str]) -> tuple[Sequence[Stem], Sequence[str]]:
        """The stems and the suffixes of some names."""
        try:
            rows = list(map(self._known.__getitem__, names))
        except KeyError:  # some are new
            rows = self._learn(list(names))
        return list(map(_STEM, rows)), tuple(map(_SUFFIX, rows))

    def _learn(self, names: Sequence[str]) -> list[tuple[Stem, str]]:
        if len(self._known) + len(names) > _MOST:
            self._known.clear()
            self._seen.clear()
            self._stems.clear()
        rows = []
        for name in names:
            row = self._known.get(name)
            if row is None:
                stem, suffix = self._split(name)
                row = self._stems.setdefault(stem, stem), intern(suffix)
                if self._seen.setdefault(row, name) != name:
                    self.clash = True
                self._known[name] = row
            rows.append(row)
        return rows


_STEM, _SUFFIX = itemgetter(0), itemgetter(1)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Runs:
    """Modules by the keys that they have.

    Attributes:
        stems: of each module, in the order in which the file first has a key of it.
        bounds: where the keys of each begin, and where the last one's end.
        keys: of all modules.
        suffixes: of each key.
    """

    stems: Sequence[Stem]
    bounds: Sequence[int]
    keys: Sequence[str]
    suffixes: Sequence[str]

    def keys_of(self, at: int) -> dict[str, str]:
        """Suffix -> key, of one module."""
        begin, end = self.bounds[at : at + 2]
        return dict(zip(self.suffixes[begin:end], self.keys[begin:end], strict=True))

    def sorts(self, forms: Mapping[str, Form], numbers: Mapping[str, float]) -> Sequence[Hashable]:
        """For each module a sort, equal for two that have the same suffixes, forms and numbers in the same order.

        Args:
            forms: key -> form; equal ones are one object, or else they make sorts of their own.
            numbers: key -> number, for all keys of some suffixes; equal ones of one form are one object, and of two
                forms never.
        """
        differ = len(set(map(id, numbers.values()))) > 1  # one number for all, of one form, tells nothing apart
        found = {**forms, **numbers} if differ else forms
        whole = self.keys == [*found]  # nearly always they are all keys of the file, in its order
        told = found.values() if whole else map(found.__getitem__, self.keys)
        both: list[object] = [None] * (2 * len(self.keys))
        both[::2], both[1::2] = self.suffixes, map(id, told)
        each = tuple(both)
        return [each[2 * begin : 2 * end] for begin, end in pairwise(self.bounds)]


def bring_together(
    keys: Sequence[str],
    stems: Sequence[Stem],
    suffixes: Sequence[str],
    twice: Callable[[str, str], None],
    *,
    clash: bool = True,
) -> Runs:
    """The modules of some keys.

    Args:
        keys: in the order of the file.
        stems: of each.
        suffixes: of each.
        twice: told of a key and of another before it that says the same, and stands for both.
        clash: whether there may be such keys.
    """
    if clash and len(set(zip(stems, suffixes, strict=True))) < len(keys):
        keys, stems, suffixes = _once(keys, stems, suffixes, twice)
    starts = _starts(stems, is_not)  # the stem of a module is one object, nearly always
    heads = list(map(stems.__getitem__, starts))
    if len(set(heads)) < len(heads):  # keys of other modules lie between those of one
        first: dict[Stem, int] = {}
        for at, stem in enumerate(stems):
            first.setdefault(stem, at)
        order = sorted(range(len(stems)), key=list(map(first.__getitem__, stems)).__getitem__)
        keys, stems = [keys[at] for at in order], [stems[at] for at in order]
        suffixes = [suffixes[at] for at in order]
        starts = _starts(stems, ne)
        heads = list(map(stems.__getitem__, starts))
    return Runs(stems=heads, bounds=[*starts, len(keys)], keys=keys, suffixes=suffixes)


def runs_of(modules: Mapping[str, dict[str, str]]) -> Runs:
    """The same of modules that are known by their names alone: module -> suffix -> key."""
    each = modules.values()
    return Runs(
        stems=[("", module) for module in modules],
        bounds=list(accumulate(map(len, each), initial=0)),
        keys=list(chain.from_iterable(map(dict.values, each))),
        suffixes=list(chain.from_iterable(each)),
    )


def _starts(stems: Sequence[Stem], other: Callable[[Stem, Stem], bool]) -> list[int]:
    """Where another stem begins."""
    return [0, *compress(range(1, len(stems)), map(other, stems[1:], stems))] if stems else []


def _once(
    keys: Sequence[str], stems: Sequence[Stem], suffixes: Sequence[str], twice: Callable[[str, str], None]
) -> tuple[list[str], list[Stem], list[str]]:
    kept: dict[tuple[Stem, str], str] = {}
    for key, stem, suffix in zip(keys, stems, suffixes, strict=True):
        if (other := kept.setdefault((stem, suffix), key)) is not key:
            twice(key, other)
    return list(kept.values()), [stem for stem, _ in kept], [suffix for _, suffix in kept]
