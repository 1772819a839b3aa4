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
from lorahub.engine.folding.sums import Change
from lorahub.engine.kernels.checksum_torch import checksum_weights
from lorahub.engine.kernels.compiling import library
from lorahub.engine.undoing.residual import Steps
from lorahub.lazy import torch

__all__ = ["HIGHEST_RANK", "Kernel", "Notes", "Packed", "kernel"]

HIGHEST_RANK = 256
"""Beyond it ``down`` does not stay in a core's cache, and a library's product of blocks is faster."""

_SOURCES = tuple(map(Path(__file__).with_name, ("merge.c", "machine.h")))
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
        ("scale", ctypes.c_double),
        ("by_row", ctypes.c_void_p),
        ("first", ctypes.c_int64),
        ("book", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
    )


@final
@dataclass(frozen=True, slots=True)
class Packed:
    """Factors as the kernel reads them for weights of one dtype.

    Attributes:
        up: ``[m, r]`` in the dtype of the sums, or bfloat16 with an even r.
        down: ``[panels, r, panel]`` of that dtype; bfloat16 ``[panels, r / 2, panel, 2]``.  Where weights have 16 bits,
            a panel's even columns come before its odd ones.
        rank: before it was made even.
        columns: before they were made whole panels.
    """

    up: torch.Tensor
    down: torch.Tensor
    rank: int
    columns: int


@final
class Notes:
    """What the kernel notes of one pass, or of several one after another, over rows that lie together."""

    def __init__(self, kernel: Kernel, storage: torch.dtype, count: int, columns: int, space: Workspace) -> None:
        """Nothing is noted yet.

        Args:
            kernel: what will note.
            storage: dtype of the rows.
            count: elements of the rows.
            columns: the most that a matrix among them has.
            space: scratch memory.
        """
        cpu = torch.device("cpu")
        word = torch.int16 if storage.itemsize == 2 else torch.int32
        self._steps = space.take("notes: steps", (count + count // 255 + 1,), torch.uint8, cpu)
        self._codes = space.take("notes: codes", (count,), torch.int8, cpu)
        self._apart = space.take("notes: apart", (count,), word, cpu)
        self.scratch = space.take("notes: scratch", (kernel.scratch(storage, columns),), torch.uint8, cpu)
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

        self._panel, self._rows = number("panel_bytes"), number("scratch_rows")
        names = {(torch.float32, False): "float32", (torch.bfloat16, False): "bfloat16"}
        if number("has_dots"):
            names[torch.bfloat16, True] = "bfloat16_dots"
        if number("has_float16"):
            names[torch.float16, False] = "float16"
        self._merge = {key: compiled[f"merge_{name}"] for key, name in names.items()}
        self._look = {key: compiled[f"look_{name}"] for key, name in names.items()}
        self._squares = {key: compiled[f"squares_{name}"] for key, name in names.items()}
        self._restore = {size: compiled[f"restore_{size}"] for size in (2, 4)}
        self._keep, self._end = compiled.keep, compiled.checksum_end
        for silent in (*self._look.values(), *self._squares.values(), *self._restore.values(), self._keep):
            silent.restype = None
        self._checksum = compiled.checksum
        self._end.restype = self._checksum.restype = ctypes.c_int64

    def takes(self, storage: torch.dtype, rank: int) -> bool:
        """Whether it merges changes of this rank into weights of this dtype."""
        return (storage, False) in self._merge and rank <= HIGHEST_RANK * 2 // storage.itemsize

    def scratch(self, storage: torch.dtype, columns: int) -> int:
        """How many bytes a pass that notes needs."""
        room = self._whole(storage, columns) + self._panel // storage.itemsize
        return self._rows * room * (2 + storage.itemsize)

    def pack(self, up: torch.Tensor, down: torch.Tensor, storage: torch.dtype) -> Packed:
        """Lay factors out for weights of a dtype.

        Args:
            up: ``[m, r]``; what is more exact than the sums is rounded to their dtype.
            down: ``[r, n]``.
            storage: of the weights.
        """
        (rank, columns), panel = down.shape, self._panel // storage.itemsize
        panels, turns = self._whole(storage, columns) // panel, 4 // storage.itemsize
        dots = (storage, True) in self._merge and _is_short(up) and _is_short(down)
        each = 2 if dots else 1
        sums = torch.float32 if storage.itemsize == 2 else torch.float64
        dtype, even = (torch.bfloat16 if dots else sums), -(-rank // each) * each
        left, right = _filled(up, (len(up), even), dtype), _filled(down, (even, panels * panel), dtype)
        inner = right.view(even // each, each, panels, panel // turns, turns).permute(2, 0, 4, 3, 1).contiguous()
        return Packed(left, inner, rank, columns)

    def look(self, packed: Packed, rows: slice, scale: float, before: torch.Tensor, pick: slice) -> Change:
        """What ``add`` would do to some rows; nothing is written.

        Args:
            packed: the factors.
            rows: which of theirs.
            scale: of the product.
            before: ``[rows, n]``, contiguous.
            pick: which of its rows are looked at.
        """
        job = self._job(packed, rows, scale, before)
        sizes = (ctypes.c_double * 4)()
        self._look[self._key(packed, before)](ctypes.byref(job), ctypes.c_int64(pick.step), sizes)
        found, added, kept, lost = sizes
        return Change(found, added, added, kept, lost)

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
        """``out = before + scale * up @ down``, rounded to the nearest once.

        Sums are float32 for weights of 16 bits, and float64 for float32.

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
        job = self._job(packed, rows, scale, before)
        job.out = out.data_ptr()
        if notes:
            job.first, job.book, job.scratch = first, ctypes.addressof(notes.book), notes.scratch.data_ptr()
        return self._write(job, packed, out)

    def lengths(self, packed: Packed, rows: slice, scale: float, before: torch.Tensor) -> torch.Tensor:
        """The 2-norms of the rows of ``before + scale * up @ down``, ``[rows]`` in float64; see ``add``."""
        found = torch.empty(len(before), dtype=torch.float64)
        job = self._job(packed, rows, scale, before)
        self._squares[self._key(packed, before)](ctypes.byref(job), ctypes.c_void_p(found.data_ptr()))
        return found.sqrt_()

    def add_by_row(
        self, packed: Packed, rows: slice, by_row: torch.Tensor, before: torch.Tensor, out: torch.Tensor
    ) -> bool:
        """``out = keep * before + scale * up @ down`` with numbers of its own for each row; see ``add``.

        Args:
            packed: the factors.
            rows: which of theirs.
            by_row: ``[rows, 2]``, float64 and contiguous: keep and scale.
            before: ``[rows, n]``, contiguous.
            out: the same shape and dtype, contiguous; may be the memory of ``before``.
        """
        job = self._job(packed, rows, 1.0, before)
        job.out, job.by_row = out.data_ptr(), by_row.data_ptr()
        return self._write(job, packed, out)

    def _write(self, job: _Job, packed: Packed, out: torch.Tensor) -> bool:
        finite = bool(self._merge[self._key(packed, out)](ctypes.byref(job)))
        if not out.is_inference():
            torch.autograd.graph.increment_version(out)  # as an operation of PyTorch's would
        return finite

    def keep(self, rows: torch.Tensor, notes: Notes) -> None:
        """Note that nothing is done to some contiguous rows."""
        job = _Job(before=rows.data_ptr(), book=ctypes.addressof(notes.book))
        self._keep(ctypes.byref(job), ctypes.c_int64(rows.nbytes))

    def restore(self, residual: Steps, given: torch.Tensor) -> None:
        """``residual.apply(given)``, in no memory."""
        book = _book(residual.steps, residual.codes, residual.wide)
        book.stepped = len(residual.steps)
        self._restore[given.itemsize](ctypes.byref(book), ctypes.c_void_p(given.data_ptr()))
        if not given.is_inference():
            torch.autograd.graph.increment_version(given)

    def total(self, running: ctypes.Structure) -> int:
        """The checksum of what was added to a running one."""
        return int(self._end(ctypes.byref(running)))

    def checksum(self, tensor: torch.Tensor) -> int:
        """The checksum of a tensor's bits, as ``checksum_torch`` has it."""
        data = tensor.contiguous()
        weights = checksum_weights(data.device).data_ptr()
        return int(self._checksum(*map(ctypes.c_void_p, (data.data_ptr(), data.nbytes, weights))))

    def _whole(self, storage: torch.dtype, columns: int) -> int:
        panel = self._panel // storage.itemsize
        return -(-columns // panel) * panel

    @staticmethod
    def _key(packed: Packed, weights: torch.Tensor) -> tuple[torch.dtype, bool]:
        return weights.dtype, packed.up.dtype == torch.bfloat16

    @staticmethod
    def _job(packed: Packed, rows: slice, scale: float, before: torch.Tensor) -> _Job:
        start = packed.up.data_ptr() + (rows.start or 0) * packed.up.stride(0) * packed.up.itemsize
        return _Job(
            before=before.data_ptr(),
            rows=len(before),
            columns=packed.columns,
            rank=packed.rank,
            up=start,
            down=packed.down.data_ptr(),
            scale=scale,
        )


def _filled(numbers: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """A matrix of a dtype, contiguous, with zeros behind its rows and columns up to a shape."""
    if numbers.shape == shape:
        return numbers.to(dtype).contiguous()
    found = numbers.new_zeros(shape, dtype=dtype)
    found[: numbers.shape[0], : numbers.shape[1]] = numbers
    return found


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
    return Kernel(library(*_SOURCES))
