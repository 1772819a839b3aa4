"""A tensor as large as the parameter it changes, of which only the rows that are wanted are in memory.

Its memory is reserved and not taken; ``fill`` reads rows of it from the file, ``drop`` gives their pages back.  Unlike
a mapped file it is the process's own: a file that is cut meanwhile is an error, not a crash.
"""

from __future__ import annotations

import mmap
import sys
from dataclasses import dataclass
from math import prod
from typing import final

from lorahub.deltas.delta import Delta
from lorahub.files.dtypes import DTYPES, to_torch, torch_shape
from lorahub.files.tensors import FileSource
from lorahub.lazy import torch

__all__ = ["FEWEST", "Paged", "Pages"]

FEWEST = 32 << 20
"""Bytes below which a tensor is simply read."""


@final
class Pages:
    """The rows of one stored tensor."""

    def __init__(self, source: FileSource, key: str) -> None:
        """Reserve memory for all of it.

        Args:
            source: the file.
            key: a tensor of at least one axis; see ``possible``.
        """
        assert sys.platform != "win32"  # see possible
        info = source.info(key)
        self._source, self._key = source, key
        self._memory = mmap.mmap(-1, info.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        dtype, shape = to_torch(info.dtype), torch_shape(info.dtype, info.shape)
        self._row = prod(shape[1:]) * dtype.itemsize
        self.tensor = torch.frombuffer(self._memory, dtype=dtype).view(shape)

    @staticmethod
    def possible(source: FileSource, key: str) -> bool:
        """Whether it is worth it, and can be."""
        if sys.platform == "win32":  # where pages cannot be given back
            return False
        info = source.info(key)
        stored = info.dtype in DTYPES and not info.turned and len(info.shape) > 0
        return stored and info.nbytes >= FEWEST and hasattr(mmap.mmap, "madvise")

    def fill(self, rows: slice) -> None:
        """Read some rows.

        Raises:
            IntegrityError: the file ends too early.
        """
        start, stop = rows.start * self._row, rows.stop * self._row
        self._source.read_into(self._key, start, memoryview(self._memory)[start:stop])

    def drop(self, rows: slice) -> None:
        """Give back the pages that hold nothing but these rows, which are zeros then."""
        assert sys.platform != "win32"
        first = -(-rows.start * self._row // mmap.PAGESIZE) * mmap.PAGESIZE
        last = rows.stop * self._row // mmap.PAGESIZE * mmap.PAGESIZE
        if first < last:
            self._memory.madvise(mmap.MADV_DONTNEED, first, last - first)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Paged:
    """A delta of one such tensor: row for row that of the parameter; what it says is so for rows that are filled."""

    delta: Delta
    pages: Pages
