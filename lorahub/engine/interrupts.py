"""Ctrl-C at the moments that are fit for it.

Python raises ``KeyboardInterrupt`` between any two steps of the main thread: also after a weight was changed and before
anybody wrote down that it was, and again while that is put in order.  While interrupts are held they are remembered;
whoever holds them asks, and what is left is raised when nobody holds them any more.  Knows nothing of weights.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["held"]


class _Held:
    """The interrupts that one holder is to answer for."""

    def __init__(self) -> None:
        self.struck: list[tuple[int, FrameType | None]] = []
        self.deaf = False

    def demand_none(self) -> None:
        """Raise what was remembered, unless nobody here is to hear of it."""
        if self.struck and not self.deaf:
            self.struck.clear()
            raise KeyboardInterrupt


_holders: list[_Held] = []  # of the main thread, the innermost last


@contextmanager
def held(*, deaf: bool = False) -> Iterator[_Held]:
    """Interrupts are remembered in this block; may be nested.

    In another thread than the main one, or where somebody has a handler of their own that is not Python's, this does
    nothing: interrupts do not reach such a block, or are theirs.

    Args:
        deaf: blocks within this one do not hear of them either.

    Yields:
        What knows of them: ``demand_none`` raises ``KeyboardInterrupt``.

    Raises:
        KeyboardInterrupt: at the end of the outermost block, where nothing else is raised.
    """
    mine = _Held()
    if threading.current_thread() is not threading.main_thread():
        yield mine
        return
    mine.deaf = deaf or bool(_holders and _holders[-1].deaf)
    before: Any = signal.getsignal(signal.SIGINT)
    outermost = not _holders and callable(before)
    if outermost:
        signal.signal(signal.SIGINT, _remember)
    _holders.append(mine)
    try:
        yield mine
    finally:
        _holders.remove(mine)
        if mine.struck and _holders:  # nobody asked here
            _holders[-1].struck += mine.struck
        if outermost:
            signal.signal(signal.SIGINT, before)
    if mine.struck and not _holders:
        before(*mine.struck[0])


def _remember(number: int, frame: FrameType | None) -> None:
    if _holders:
        _holders[-1].struck.append((number, frame))
