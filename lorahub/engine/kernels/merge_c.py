"""The merge of one matrix on the CPU by ``merge.c``, with the way back noted in the same pass.

What plain torch does in one pass for each of adding, testing, taking off, comparing and summing up is one pass here,
and no copy of the weights is made.  Threads may call it at the same time: nothing of Python runs meanwhile.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import final

from lorahub.engine.crew import Workspace
from lorahub.engine.kernels.compiling import library
from lorahub.engine.undoing.checksum import checksum_weights
from lorahub.engine.undoing.residual import Steps
from lorahub.lazy import torch

__all__ = ["HIGHEST_RANK", "Kernel", "Notes", "Packed", "kernel"]

HIGHEST_RANK = 256
"""Beyond it ``down`` does not stay in a core's cache, and a library's product of blocks is faster."""

_SOURCE = Path(__file__).with_name("merge.c")
_LINE = 512  # bytes, as in the source


class _Checksum(ctypes.Structure):
    _fields_ = (
        ("weights", ctypes.c_void_p),
        ("total", ctypes.c_uint64),
        ("row", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("part", ctypes.c_uint64),
        ("columns", ctypes.c_uint64 * (_LINE // 8)),
        ("rest", ctypes.c_uint8 * _LINE),
        ("resting", ctypes.c_uint64),
    )


class _Book(ctypes.Structure):
    _fields_ = (
        ("steps", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("apart", ctypes.c_void_p),
        ("stepped", ctypes.c_int64),
        ("coded", ctypes.c_int64),
        ("wide", ctypes.c_int64),
        ("last", ctypes.c_int64),
        ("before", _Checksum),
        ("after", _Checksum),
    )


class _Job(ctypes.Structure):
    _fields_ = (
        ("before", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("rank", ctypes.c_int64),
        ("up", ctypes.c_void_p),
        ("down", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("first", ctypes.c_int64),
        ("book", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
    )


@final
@dataclass(frozen=True, slots=True)
class Packed:
    """Factors as the kernel reads them.

    Attributes:
        up: ``[m, r]`` float32, or bfloat16 with an even r.
        down: ``[panels, r, panel]`` float32; bfloat16 ``[panels, r / 2, panel, 2]``.
        rank: before it was made even.
        columns: before they were made whole panels.
    """

    up: torch.Tensor
    down: torch.Tensor
    rank: int
    columns: int


@final
class Notes:
    """What one pass over some rows notes of the way back, in a workspace's memory."""

    def __init__(self, kernel: Kernel, count: int, columns: int, space: Workspace) -> None:
        """Nothing is noted yet.

        Args:
            kernel: what will note.
            count: elements of the rows.
            columns: the most that a matrix among them has.
            space: scratch memory.
        """
        cpu = torch.device("cpu")
        self._steps = space.take("notes: steps", (count + count // 255 + 1,), torch.uint8, cpu)
        self._codes = space.take("notes: codes", (count,), torch.int8, cpu)
        self._apart = space.take("notes: apart", (count,), torch.int16, cpu)
        self.scratch = space.take("notes: scratch", (kernel.scratch(columns),), torch.int16, cpu)
        self._weights, self._kernel = checksum_weights(cpu), kernel
        self.book = _book(self._steps, self._codes, self._apart)
        self.book.last = -1
        self.book.before.weights = self.book.after.weights = self._weights.data_ptr()

    def keep(self, rows: torch.Tensor) -> None:
        """Note that nothing is done to some contiguous rows."""
        self._kernel.keep(rows, self)

    @property
    def residual(self) -> Steps:
        """What taking the change off gets wrong; views of the workspace's memory."""
        book = self.book
        return Steps(self._steps[: book.stepped], self._codes[: book.coded], self._apart[: book.wide])

    def checksums(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``checksum`` of the rows before, and after; once."""
        before, after = (self._kernel.total(each) for each in (self.book.before, self.book.after))
        return torch.tensor(before), torch.tensor(after)


@final
class Kernel:
    """The compiled ``merge.c``."""

    def __init__(self, compiled: ctypes.CDLL) -> None:
        def number(name: str) -> int:
            return int(ctypes.c_int32.in_dll(compiled, name).value)

        self._panel, self._of_column = number("panel"), number("scratch_a_column")
        self._merge = {(torch.bfloat16, False): compiled.merge_bfloat16}
        if number("has_dots"):
            self._merge[torch.bfloat16, True] = compiled.merge_bfloat16_dots
        if number("has_float16"):
            self._merge[torch.float16, False] = compiled.merge_float16
        self._keep, self._restore, self._end = compiled.keep, compiled.restore, compiled.checksum_end
        self._keep.restype = self._restore.restype = None
        self._end.restype = ctypes.c_int64

    def takes(self, storage: torch.dtype, rank: int) -> bool:
        """Whether it merges changes of this rank into weights of this dtype."""
        return (storage, False) in self._merge and rank <= HIGHEST_RANK

    def scratch(self, columns: int) -> int:
        """How many int16 a pass that notes needs."""
        return self._of_column * self._whole(columns) + self._panel

    def pack(self, up: torch.Tensor, down: torch.Tensor, storage: torch.dtype) -> Packed:
        """Lay factors out for weights of a dtype.

        Args:
            up: ``[m, r]``; numbers that bfloat16 cannot hold become float32.
            down: ``[r, n]``.
            storage: of the weights.
        """
        (rank, columns), panels = down.shape, self._whole(down.shape[1]) // self._panel
        dots = (storage, True) in self._merge and _is_short(up) and _is_short(down)
        each = 2 if dots else 1
        dtype, even = (torch.bfloat16 if dots else torch.float32), -(-rank // each) * each
        left, right = up.new_zeros(len(up), even, dtype=dtype), up.new_zeros(even, panels * self._panel, dtype=dtype)
        left[:, :rank] = up
        right[:rank, :columns] = down
        inner = right.view(even // each, each, panels, self._panel).permute(2, 0, 3, 1).contiguous()
        return Packed(left, inner, rank, columns)

    def add(
        self,
        packed: Packed,
        rows: slice,
        scale: float,
        before: torch.Tensor,
        out: torch.Tensor,
        notes: Notes | None = None,
        first: int = 0,
    ) -> bool:
        """``out = before + scale * up @ down``, summed in float32 and rounded to the nearest once.

        Args:
            packed: the factors.
            rows: which of theirs.
            scale: of the product.
            before: ``[rows, n]``, contiguous.
            out: the same shape and dtype, contiguous; may be the memory of ``before``.
            notes: where the way back is noted.
            first: elements that were noted there before.

        Returns:
            Whether every result is a finite number.
        """
        merge = self._merge[before.dtype, packed.up.dtype == torch.bfloat16]
        job = _Job(
            before=before.data_ptr(),
            out=out.data_ptr(),
            rows=len(before),
            columns=packed.columns,
            rank=packed.rank,
            up=packed.up[rows].data_ptr(),
            down=packed.down.data_ptr(),
            scale=scale,
            first=first,
            book=ctypes.addressof(notes.book) if notes else None,
            scratch=notes.scratch.data_ptr() if notes else None,
        )
        finite = bool(merge(ctypes.byref(job)))
        if not out.is_inference():
            torch.autograd.graph.increment_version(out)  # as an operation of PyTorch's would
        return finite

    def keep(self, rows: torch.Tensor, notes: Notes) -> None:
        """Note that nothing is done to some contiguous rows."""
        job = _Job(before=rows.data_ptr(), rows=1, columns=rows.numel(), book=ctypes.addressof(notes.book))
        self._keep(ctypes.byref(job))

    def restore(self, residual: Steps, given: torch.Tensor) -> None:
        """``residual.apply(given)``, in no memory."""
        book = _book(residual.steps, residual.codes, residual.wide)
        book.stepped = len(residual.steps)
        self._restore(ctypes.byref(book), ctypes.c_void_p(given.data_ptr()))
        if not given.is_inference():
            torch.autograd.graph.increment_version(given)

    def total(self, running: ctypes.Structure) -> int:
        """The checksum of what was added to a running one."""
        return int(self._end(ctypes.byref(running)))

    def _whole(self, columns: int) -> int:
        return -(-columns // self._panel) * self._panel


def _is_short(numbers: torch.Tensor) -> bool:
    """Whether bfloat16 holds these numbers."""
    return numbers.dtype == torch.bfloat16 or torch.equal(numbers.bfloat16().to(numbers.dtype), numbers)


def _book(steps: torch.Tensor, codes: torch.Tensor, apart: torch.Tensor) -> _Book:
    return _Book(steps=steps.data_ptr(), codes=codes.data_ptr(), apart=apart.data_ptr())


@lru_cache(maxsize=1)
def kernel() -> Kernel:
    """The kernel, compiled where it is not yet.

    Raises:
        NotCompiled: it cannot be.
    """
    return Kernel(library(_SOURCE))
