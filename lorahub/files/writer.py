"""Write safetensors files: the same input gives the same bytes, and a file appears whole or not at all.

The whole layout is known before the first tensor: room is reserved at once (so a full disk says so early), tensors
arrive in any order and in pieces, from several threads, and untouched ones move inside the kernel.  The layout is
proven by reading it back with ``parse_header``, so nothing is written that would not be read.
"""

from __future__ import annotations

import errno
import json
import os
import threading
import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from contextlib import suppress
from operator import index
from pathlib import Path
from types import TracebackType
from typing import Self, TypeAlias, final

from lorahub.errors import HeaderError, UsageError, WriteFailed
from lorahub.files.atomic import flush, new_partial, put_in_place, write_failed
from lorahub.files.direct import BLOCK, Direct
from lorahub.files.dtypes import DTYPES, from_torch, nbytes, stored_shape
from lorahub.files.grammar import show
from lorahub.files.header import METADATA, Header, Limits, parse_header, prefixed
from lorahub.files.raw import Bytes, as_bytes, copy_range, open_regular, read_into, write_at
from lorahub.files.tensors import tensor_bytes
from lorahub.lazy import torch

__all__ = ["Entries", "StreamWriter", "encode_header", "save_file", "usual_order"]

Entries: TypeAlias = "Mapping[str, tuple[str, Sequence[int]]]"
"""Name -> (safetensors dtype code, stored shape), in the order the bytes shall lie."""


def encode_header(
    entries: Entries, metadata: Mapping[str, str] | None = None, limits: Limits | None = None, *, prefix: str = ""
) -> bytes:
    """Everything that comes before the tensors' bytes: length, JSON, and blanks up to a multiple of eight.

    Tensors lie in the order of ``entries``, without holes; metadata is sorted by key.  The names of ``entries`` begin
    with ``prefix``, and those in the file do not.

    Raises:
        UsageError: a name, shape or metadata value that could not be read back.
        UnsupportedFormat: an unknown dtype.
    """
    return _layout(_bare(entries, prefix), metadata, limits)[0]


def _bare(entries: Entries, prefix: str) -> Entries:
    return {name.removeprefix(prefix): entry for name, entry in entries.items()} if prefix else entries


def usual_order(entries: Entries) -> dict[str, tuple[str, Sequence[int]]]:
    """The entries as the reference implementation orders them: wide elements first, which aligns all, then by name."""
    rank = {code: number for number, code in enumerate(DTYPES)}
    return dict(sorted(entries.items(), key=lambda item: (-rank.get(item[1][0], 0), item[0])))


def _layout(entries: Entries, metadata: Mapping[str, str] | None, limits: Limits | None) -> tuple[bytes, Header]:
    if METADATA in entries:
        raise UsageError(f"a tensor cannot be named {METADATA}", "rename it")
    content: dict[str, object] = {METADATA: dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    try:
        for name, (dtype, shape) in entries.items():
            sizes = [index(size) for size in shape]
            if any(size < 0 for size in sizes):
                raise UsageError(f"tensor {show(name)} cannot have the shape {sizes}")
            start, end = end, end + nbytes(dtype, sizes)
            content[name] = {"dtype": dtype, "shape": sizes, "data_offsets": [start, end]}
        text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        encoded = len(text).to_bytes(8, "little") + text

        def read(offset: int, length: int) -> bytes:  # the data section, which does not exist yet, reads as zeros
            return encoded[offset : offset + length].ljust(length, b"\0")

        header = parse_header(read, len(encoded) + end, where="its header", limits=limits)
    except HeaderError as error:
        raise UsageError(f"this cannot be written as safetensors: {error.message}") from None
    except (TypeError, ValueError) as error:  # no integer, no string, half a surrogate pair
        raise UsageError(f"this cannot be written as safetensors: {error}") from None
    return encoded, header


@final
class StreamWriter:
    """A safetensors file in the making.

    Nothing exists at ``path`` until ``commit``, which demands that every byte was written; leaving the ``with`` block
    without it, by an exception or otherwise, discards the work.  ``write`` and ``copy_from`` may be called from
    several threads.

    Attributes:
        path: where the file goes.
        header: as it will be read back.
        sums: (offset in the file, bytes, CRC-32) of what ``write`` was given, where that was asked for.

        with StreamWriter(path, {"w": ("F32", [2])}) as out:
            out.write("w", 0, data)
            out.commit()
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        entries: Entries,
        metadata: Mapping[str, str] | None = None,
        *,
        limits: Limits | None = None,
        sums: bool = False,
        prefix: str = "",
    ) -> None:
        """Lay the file out, create it beside ``path`` and reserve its room.

        Args:
            path: where it goes.
            entries: its tensors.
            metadata: of its header.
            limits: what ``parse_header`` allows.
            sums: keep the checksum of all that is written.
            prefix: what tensors are called here, before their names in the file.

        Raises:
            UsageError, UnsupportedFormat: as ``encode_header``.
            WriteFailed: it cannot be created, or there is no room for it.
        """
        self.path = Path(path)
        self._encoded, header = _layout(_bare(entries, prefix), metadata, limits)
        self.header = prefixed(header, prefix)
        self._written = {name: _Coverage() for name in self.header.tensors}
        self.sums: list[tuple[int, int, int]] = []
        self._summed = sums
        self._lock = threading.Lock()
        self._done = False
        try:
            self._file, self._partial = new_partial(self.path)
        except OSError as error:
            raise write_failed(self.path, error) from None
        self._direct = Direct(self._file, self._partial)
        try:
            _reserve(self._file.fileno(), self.header.size)
            write_at(self._file, 0, self._encoded)
        except BaseException as error:
            self.discard()
            if isinstance(error, OSError):
                raise write_failed(self.path, error) from None
            raise

    def write(self, name: str, offset: int, data: Bytes) -> None:
        """Write bytes of a tensor from its byte ``offset`` on.

        Raises:
            UsageError: there is no such tensor, the bytes go beyond it, or the writer is finished.
            WriteFailed: the system cannot write them.
        """
        view = as_bytes(data)
        at = self._claim(name, offset, len(view))
        try:
            self._direct.write(at, view)
        except OSError as error:
            raise write_failed(self.path, error) from None
        self._note(name, offset, len(view))
        if self._summed:
            self.sums.append((at, len(view), zlib.crc32(view)))

    def phase(self, name: str, offset: int) -> int:
        """Where in a block byte ``offset`` of a tensor goes; memory that begins so needs no copy on its way."""
        return (self.header.span(name)[0] + offset) % BLOCK

    def copy_from(self, name: str, source: str | os.PathLike[str], offset: int, length: int, *, at: int = 0) -> None:
        """Copy bytes of another file, ``length`` from its ``offset``, to byte ``at`` of a tensor.

        Raises:
            UsageError: there is no such tensor, the bytes go beyond it, or the writer is finished.
            NotFound, AccessDenied: the source cannot be opened.
            IntegrityError: the source ends too early.
            WriteFailed: the system cannot write them.
        """
        target = self._claim(name, at, length)
        with open_regular(source) as file:
            try:
                copy_range(file, offset, self._file, target, length)
            except OSError as error:
                raise write_failed(self.path, error) from None
        self._note(name, at, length)

    def copy_whole(self, source: str | os.PathLike[str]) -> bool:
        """Take over a file of the very same layout; whether it is one.

        From its first byte to its last, so that file systems that can (Btrfs, XFS) share its blocks and copy nothing.

        Raises:
            UsageError, NotFound, AccessDenied, IntegrityError, WriteFailed: as ``copy_from``.
        """
        self._unfinished()
        with open_regular(source) as file:
            before = bytearray(self.header.data_start)
            if os.fstat(file.fileno()).st_size != self.header.size:
                return False
            read_into(file, 0, before)
            if before != self._encoded:
                return False
            try:
                copy_range(file, 0, self._file, 0, self.header.size)
            except OSError as error:
                raise write_failed(self.path, error) from None
        for name, info in self.header.tensors.items():
            self._note(name, 0, info.nbytes)
        return True

    def commit(self) -> Path:
        """Bring the file to the disk and put it at ``path``, replacing what was there.

        Raises:
            WriteFailed: bytes are missing, or the system cannot do it; the work is discarded.
            UsageError: the writer is finished already.
        """
        self._unfinished()
        missing = [name for name, info in self.header.tensors.items() if not self._written[name].whole(info.nbytes)]
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            self.discard()
            raise WriteFailed(
                f"{self.path} was not written: of {len(self.header.tensors)} tensors {len(missing)} are incomplete, "
                f"{', '.join(map(show, missing[:3]))}{more}"
            )
        try:
            self._direct.close()
            flush(self._file)
            self._file.close()
            put_in_place(self._partial, self.path)
        except OSError as error:
            self.discard()
            raise write_failed(self.path, error) from None
        self._done = True
        return self.path

    def discard(self) -> None:
        """Remove what was written so far; nothing happens after ``commit``."""
        if self._done:
            return
        self._done = True
        with suppress(OSError):
            self._direct.close()
        with suppress(OSError):
            self._file.close()
        with suppress(OSError):  # the name tells that it is unfinished, wherever it stays behind
            self._partial.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()

    def _unfinished(self) -> None:
        if self._done:
            raise UsageError(f"{self.path} is finished: nothing more can be written to it")

    def _claim(self, name: str, offset: int, length: int) -> int:
        """Where in the file those bytes of a tensor go."""
        self._unfinished()
        if name not in self.header.tensors:
            raise UsageError(f"{self.path} was laid out without a tensor {show(name)}")
        start, size = self.header.span(name)
        if not 0 <= offset <= offset + length <= size:
            raise UsageError(f"bytes {offset} to {offset + length} lie outside tensor {show(name)}, which has {size}")
        return start + offset

    def _note(self, name: str, offset: int, length: int) -> None:
        with self._lock:
            self._written[name].add(offset, offset + length)


@final
class _Coverage:
    """Which bytes of a tensor were written: sorted ranges that neither touch nor overlap."""

    __slots__ = ("starts", "stops")

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.stops: list[int] = []

    def add(self, start: int, stop: int) -> None:
        first = bisect_left(self.stops, start)  # the first range that reaches up to here
        last = bisect_right(self.starts, stop)  # the first one that begins beyond
        if first < last:
            start, stop = min(start, self.starts[first]), max(stop, self.stops[last - 1])
        self.starts[first:last] = [start]
        self.stops[first:last] = [stop]

    def whole(self, size: int) -> bool:
        return not size or (self.starts == [0] and self.stops == [size])


def _reserve(handle: int, size: int) -> None:
    """Take the room for a file at once, where the file system can; otherwise only give it its size."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(handle, 0, size)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
        else:
            return
    os.ftruncate(handle, size)


def save_file(
    path: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    limits: Limits | None = None,
) -> Path:
    """Write tensors to a safetensors file, in ``usual_order``; same tensors and metadata, same bytes.

    Tensors may lie on any device and in any strides; those that share memory are written each for itself.

    Raises:
        UnsupportedFormat: a tensor that no safetensors file can hold.
        UsageError: a name or metadata that could not be read back.
        WriteFailed: the file cannot be written.
    """
    entries: dict[str, tuple[str, Sequence[int]]] = {}
    for name, tensor in tensors.items():
        code = from_torch(tensor.dtype)
        entries[name] = (code, stored_shape(code, tensor.shape))
    with StreamWriter(path, usual_order(entries), metadata, limits=limits) as out:
        for name in out.header.tensors:
            out.write(name, 0, tensor_bytes(tensors[name]))
        return out.commit()
