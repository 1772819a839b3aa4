"""What names of tensors show by themselves: each name is looked at once, however many files have it.

A format recognises files by tests on names ("begins with lora_unet_").  Folders have the same few thousand names over
and over, and two dozen formats look at each; here all tests are answered together, and a header is what its names show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import reduce
from operator import or_
from typing import final

from lorahub.files.header import Header

__all__ = ["Mark"]

_MOST = 1 << 16
"""Names remembered: those of some thirty bases, 150 bytes each."""

_tests: list[Callable[[str], bool]] = []
_shown: dict[str, int] = {}
"""Name -> the tests that it passes, as bits."""

_last: list[tuple[Mapping[str, object], int]] = []
"""The tensors that were asked about last, and what any of them shows: every format asks about the same header."""


@final
class Mark:
    """A test on the name of a tensor, to be made when a module is imported.

    Args:
        test: of the name and nothing else.
    """

    def __init__(self, test: Callable[[str], bool]) -> None:
        self._bit = 1 << len(_tests)
        _tests.append(test)
        _shown.clear()
        _last.clear()

    def on(self, headers: Iterable[Header]) -> bool:
        """Whether any tensor has it."""
        bit = self._bit
        for header in headers:  # noqa: SIM110 - asked for every format and file, and a generator takes longer
            if _all(header.tensors) & bit:
                return True
        return False


def _all(tensors: Mapping[str, object]) -> int:
    """What any of the names shows."""
    for known, found in _last[:]:
        if known is tensors:
            return found
    try:
        each = set(map(_shown.__getitem__, tensors))
    except KeyError:  # some are new
        if len(_shown) + len(tensors) > _MOST:
            _shown.clear()
        each = set()
        for name in tensors:
            shown = _shown.get(name)
            if shown is None:
                shown = _shown[name] = _test(name)
            each.add(shown)
    found = reduce(or_, each, 0)
    _last[:] = [(tensors, found)]
    return found


def _test(name: str) -> int:
    shown = 0
    for at, test in enumerate(_tests):
        if test(name):
            shown |= 1 << at
    return shown
