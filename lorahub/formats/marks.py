"""What names of tensors show by themselves: each name is looked at once, however many files have it.

A format recognises files by tests on names ("begins with lora_unet_").  Folders have the same few thousand names over
and over, and two dozen formats look at each; here all tests are answered together, and a header is what its names show.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import reduce
from operator import or_
from typing import final

from lorahub.files.header import Header

__all__ = ["Mark"]

_MOST = 1 << 16
"""Names remembered: those of some thirty bases, 150 bytes each."""

_marks: list[Mark] = []
_shown: dict[str, int] = {}
"""Name -> the marks that it has, as bits."""

_last: list[tuple[Mapping[str, object] | None, int]] = [(None, 0)]
"""The tensors that were asked about last, and what any of them shows: every format asks about the same header."""


@final
class Mark:
    """What the name of a tensor may have, to be made when a module is imported: all that is given holds for it.

    Args:
        test: of the name and nothing else; the slowest part, made where the others hold.
        begins: it begins with one of these.
        ends: it ends in one of these.
    """

    def __init__(
        self, test: Callable[[str], bool] | None = None, *, begins: Sequence[str] = (), ends: Sequence[str] = ()
    ) -> None:
        self._test, self._begins, self._ends = test, tuple(begins), tuple(ends)
        self._bit = 1 << len(_marks)
        _marks.append(self)
        _shown.clear()
        _last[0] = None, 0

    def on(self, headers: Iterable[Header]) -> bool:
        """Whether any tensor has it."""
        bit = self._bit
        for header in headers:  # noqa: SIM110 - asked for every format and file, and a generator takes longer
            if _all(header.tensors) & bit:
                return True
        return False

    def among(self, names: Collection[str]) -> Collection[str]:
        """Those of some names that have it."""
        if begins := self._begins:
            names = [name for name in names if name.startswith(begins)]
        if ends := self._ends:
            names = [name for name in names if name.endswith(ends)]
        return names if self._test is None else [*filter(self._test, names)]


def _all(tensors: Mapping[str, object]) -> int:
    """What any of the names shows."""
    known, found = _last[0]
    if known is tensors:
        return found
    try:
        each = set(map(_shown.__getitem__, tensors))
    except KeyError:  # some are new
        if len(_shown) + len(tensors) > _MOST:
            _shown.clear()
        rows = [(name, _shown.get(name)) for name in tensors]
        new = _look([name for name, shown in rows if shown is None])
        _shown.update(new)
        each = {*new.values(), *(shown for _, shown in rows if shown is not None)}
    found = reduce(or_, each, 0)
    _last[0] = tensors, found
    return found


def _look(names: Sequence[str]) -> dict[str, int]:
    """What each of some names shows, one mark after another: there are a few thousand names to two dozen marks."""
    shown = dict.fromkeys(names, 0)
    for at, mark in enumerate(_marks):
        for name in mark.among(names):
            shown[name] |= 1 << at
    return shown
