"""How a parameter is cut into windows: a function of its shape and dtype alone, so every engine cuts alike.

A window is what one core sums at a time, small enough to stay in its cache.  A unit is what one job reads, folds and
writes: several windows that lie together in the file.  Knows no tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from math import prod

__all__ = ["ARITHMETIC", "UNIT", "WINDOW", "cut", "gather", "sample"]

ARITHMETIC = 5
"""Raised whenever the bits of a result could change: part of every plan's digest."""

WINDOW = 2 << 20
"""Bytes of one window in the dtype of the sum.

Measured on a 4096 x 4096 bfloat16 parameter at rank 16 with float32 sums, one core with 1 MiB of L2 and 16 MiB of L3 to
itself: 256 KiB 16 ms, 512 KiB 13 ms, 1 MiB 11 ms, 2 to 8 MiB 10 ms.
"""

UNIT = 8 << 20
"""Bytes of one unit as stored."""

_FEWEST = 4  # so that no window has one row: a product with one row takes another path through the BLAS

_SAMPLE = 1 << 14
_ROWS = range(4, 257)


def sample(shape: Sequence[int]) -> tuple[slice, float]:
    """Which of some rows stand for all of them where changes are measured, and for how many each.

    Evenly spread, 4 to 256 rows of a unit (at most 1024 of a parameter of ordinary size), about 16 thousand elements:
    the share of a change that survives is known to a hundredth then, at a cost that does not show.
    """
    rows = shape[0]
    count = min(max(_SAMPLE // max(prod(shape[1:]), 1), _ROWS.start), _ROWS.stop - 1)
    step = max(rows // count, 1)
    taken = len(range(0, rows, step))
    return slice(0, rows, step), rows / max(taken, 1)


def cut(start: int, stop: int, row_bytes: int, *, window: int = WINDOW) -> tuple[slice, ...]:
    """Rows ``start`` to ``stop`` in windows of equal height, up to one row, of at most ``window`` bytes or 4 rows."""
    rows = stop - start
    if rows <= 0:
        return ()
    highest = max(window // max(row_bytes, 1), _FEWEST)
    count = -(-rows // highest)
    edges = [start + rows * number // count for number in range(count + 1)]
    return tuple(slice(a, b) for a, b in pairwise(edges))


def gather(windows: Iterable[slice], row_bytes: int, *, unit: int = UNIT) -> tuple[tuple[slice, ...], ...]:
    """Consecutive windows in groups of at most ``unit`` stored bytes, or one window each."""
    groups: list[list[slice]] = []
    for window in windows:
        if groups and _height(groups[-1]) + window.stop - window.start <= unit // max(row_bytes, 1):
            groups[-1].append(window)
        else:
            groups.append([window])
    return tuple(map(tuple, groups))


def _height(windows: Sequence[slice]) -> int:
    return int(windows[-1].stop - windows[0].start)
