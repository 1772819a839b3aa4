"""Many tensors of one file in few reads: those that lie one behind the other become views of one piece of memory.

A tensor for itself costs a call of the system, an allocation and the pages of that; of an adapter's hundreds these take
longer than its bytes.  Knows positions, sizes and dtypes; opens nothing.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple, TypeAlias

from lorahub.lazy import torch

__all__ = ["Span", "read_views"]

GAP = 1 << 16
"""Bytes between two tensors that are read along rather than skipped."""

LARGE = 4 << 20
"""Bytes from which on memory is asked of the system in large pages."""

Fill: TypeAlias = Callable[[int, memoryview], None]
"""Puts the file's bytes from an offset on into a buffer."""


class Span(NamedTuple):
    """A tensor in a file: from where to where, and as what."""

    start: int
    stop: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def read_views(spans: Sequence[Span], fill: Fill) -> list[torch.Tensor]:
    """One tensor for each span, in memory that nobody else has; no span is empty.

    A tensor whose place does not suit its dtype is copied to one that does.
    """
    found: dict[Span, torch.Tensor] = {}
    for run in _runs(sorted(set(spans))):
        start = run[0].start
        size = max(span.stop for span in run) - start
        buffer = _memory(size)
        fill(start, buffer.numpy().data)
        for span in run:
            flat = buffer[span.start - start : span.stop - start]
            even = (span.start - start) % span.dtype.itemsize == 0
            whole = (flat if even else flat.clone()).view(span.dtype).view(span.shape)
            found[span] = whole.data  # tensors of their own: views would count each other's changes as theirs
    return [found[span] for span in spans]


def _runs(spans: Sequence[Span]) -> Iterator[list[Span]]:
    """Spans in order, as far as they follow one another."""
    run: list[Span] = []
    stop = 0
    for span in spans:
        if run and span.start > stop + GAP:
            yield run
            run = []
        run.append(span)
        stop = max(stop, span.stop)
    if run:
        yield run


def _memory(size: int) -> torch.Tensor:
    """Bytes that were not written to; in large pages where the system has them, which cost less to come by."""
    if size < LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a system without large pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)  # holds the pages for as long as it lives
