"""Ctrl-C at the moments that are fit for it.

Python raises ``KeyboardInterrupt`` between any two steps of the main thread: also after a weight was changed and before
anybody wrote down that it was, and again while that is put in order.  While interrupts are held they are remembered;
whoever holds them asks, and what is left is raised when nobody holds them any more.  Knows nothing of weights.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["held"]


class _Held:
    """The interrupts that one holder is to answer for, and how they would be answered if nobody held them."""

    def __init__(self, handler: Callable[[int, FrameType | None], object] | None = None, *, deaf: bool = False) -> None:
        self.struck: list[tuple[int, FrameType | None]] = []
        self.handler, self.deaf = handler, deaf

    def demand_none(self) -> None:
        """Answer what was remembered, unless nobody here is to hear of it: Python's own handler raises."""
        if self.struck and not self.deaf and self.handler is not None:
            first = self.struck[0]
            self.struck.clear()
            self.handler(*first)


_holders: list[_Held] = []  # of the main thread, the innermost last


@contextmanager
def held(*, deaf: bool = False) -> Iterator[_Held]:
    """Interrupts are remembered in this block; may be nested.

    In another thread than the main one, and where interrupts are ignored or end the process, this does nothing.
    Where somebody has a handler of their own, that answers what is remembered.

    Args:
        deaf: blocks within this one do not hear of them either.

    Yields:
        What knows of them: ``demand_none`` answers them, by ``KeyboardInterrupt`` as a rule.

    Raises:
        KeyboardInterrupt: at the end of the outermost block, where nothing else is raised.
    """
    if threading.current_thread() is not threading.main_thread():
        yield _Held()
        return
    outer = _holders[-1] if _holders else None
    before: Any = signal.getsignal(signal.SIGINT) if outer is None else outer.handler
    mine = _Held(before if callable(before) else None, deaf=deaf or (outer is not None and outer.deaf))
    mounted = outer is None and mine.handler is not None
    if mounted:
        signal.signal(signal.SIGINT, _remember)
    _holders.append(mine)
    try:
        yield mine
    finally:
        _holders.remove(mine)
        if outer is not None:
            outer.struck += mine.struck  # nobody asked here
        if mounted:
            signal.signal(signal.SIGINT, before)
    if outer is None:
        mine.deaf = False
        mine.demand_none()


def _remember(number: int, frame: FrameType | None) -> None:
    if _holders:
        _holders[-1].struck.append((number, frame))
