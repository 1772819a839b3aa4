"""Positioned reads, writes and copies on regular files, with what the platform offers.

Knows nothing of tensors.  Every function may be called from several threads on one file; where the platform has no
positioned I/O, one lock makes it so.
"""

from __future__ import annotations

import errno
import io
import os
import stat
import threading
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

from lorahub.errors import AccessDenied, IntegrityError, NotFound, Unavailable

__all__ = ["CHUNK", "Bytes", "as_bytes", "copy_range", "open_regular", "read_bytes", "read_into", "write_at"]

Bytes: TypeAlias = "bytes | bytearray | memoryview"

CHUNK = 4 << 20
"""Bytes moved at a time where something has to pass through memory."""

_seeking = threading.Lock()  # for platforms without positioned I/O

# What copy_file_range says where it cannot serve these two files; anything else is a real failure.
_NO_KERNEL_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM, errno.ETXTBSY}


def as_bytes(data: Bytes) -> memoryview:
    """A flat view of unsigned bytes over any contiguous buffer, empty ones included."""
    view = memoryview(data)
    return view.cast("B") if view.nbytes else memoryview(bytearray())


def open_regular(path: str | os.PathLike[str]) -> io.FileIO:
    """Open a regular file for reading, following links, without a buffer of its own.

    Raises:
        NotFound: nothing is there, or a folder, pipe or device is.
        AccessDenied: it may not be read.
        Unavailable: the system cannot read it.
    """
    path = path if isinstance(path, Path) else Path(path)
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise NotFound(f"{path} is a folder, not a file", "name a file inside it")
        if not stat.S_ISREG(mode):  # opening a pipe would wait for a writer
            raise NotFound(f"{path} is not a regular file")
        return path.open("rb", buffering=0)
    except (FileNotFoundError, NotADirectoryError):
        what = "is a link to nothing" if path.is_symlink() else "does not exist"
        raise NotFound(f"{path} {what}") from None
    except PermissionError as error:
        raise AccessDenied(f"{path} may not be read: {error.strerror}", "look at its permissions: ls -l") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise _unreadable(path, error) from None


def _unreadable(path: object, error: Exception) -> Unavailable:
    return Unavailable(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}")


def read_into(file: io.FileIO, offset: int, buffer: Bytes) -> None:
    """Fill ``buffer`` with the bytes from ``offset`` on.

    Raises:
        IntegrityError: the file ends before the buffer is full.
        Unavailable: the system cannot read it.
    """
    view = as_bytes(buffer)
    done = 0
    while done < len(view):
        try:
            count = _read_some(file, offset + done, view[done:])
        except OSError as error:
            raise _unreadable(file.name, error) from None
        if not count:
            raise IntegrityError(
                f"{file.name} ends at byte {offset + done}, and {len(view) - done} more were expected",
                "it was cut off, or changed while it was read: fetch it again",
            )
        done += count


def read_bytes(file: io.FileIO, offset: int, length: int) -> bytes:
    """The bytes from ``offset`` on.

    Raises:
        IntegrityError, Unavailable: as ``read_into``.
    """
    if hasattr(os, "pread") and length <= CHUNK:
        with suppress(OSError):
            data = os.pread(file.fileno(), length, offset)
            if len(data) == length:  # nearly always, and then nothing is copied
                return data
    buffer = bytearray(length)
    read_into(file, offset, buffer)
    return bytes(buffer)


def _read_some(file: io.FileIO, offset: int, view: memoryview) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(file.fileno(), [view], offset)
    if hasattr(os, "pread"):
        data = os.pread(file.fileno(), min(len(view), CHUNK), offset)
        view[: len(data)] = data
        return len(data)
    with _seeking:
        file.seek(offset)
        return file.readinto(view)


def write_at(file: io.FileIO, offset: int, data: Bytes) -> None:
    """Write all of ``data`` at ``offset``.

    Raises:
        OSError: as the system gives it; the caller knows what was being made.
    """
    view = as_bytes(data)
    done = 0
    while done < len(view):
        done += _write_some(file, offset + done, view[done:])


def _write_some(file: io.FileIO, offset: int, view: memoryview) -> int:
    if hasattr(os, "pwrite"):
        return os.pwrite(file.fileno(), view, offset)
    with _seeking:
        file.seek(offset)
        return file.write(view)


def copy_range(source: io.FileIO, offset: int, target: io.FileIO, at: int, length: int) -> None:
    """Copy ``length`` bytes from ``offset`` of one file to ``at`` of another, inside the kernel where it can.

    Raises:
        IntegrityError: the source ends too early.
        OSError: the target cannot be written, as the system gives it.
    """
    done = _kernel_copy(source, offset, target, at, length)
    if done == length:
        return
    buffer = memoryview(bytearray(min(CHUNK, length - done)))
    while done < length:
        part = buffer[: length - done]
        read_into(source, offset + done, part)
        write_at(target, at + done, part)
        done += len(part)


def _kernel_copy(source: io.FileIO, offset: int, target: io.FileIO, at: int, length: int) -> int:
    """Bytes the kernel copied; fewer than asked where it cannot serve these files, or the source has ended."""
    done = 0
    if not hasattr(os, "copy_file_range"):
        return done
    while done < length:
        try:
            count = os.copy_file_range(source.fileno(), target.fileno(), length - done, offset + done, at + done)
        except OSError as error:
            if error.errno in _NO_KERNEL_COPY:
                return done
            raise
        if not count:  # the end of the source, or a file system that copies nothing; the plain copy tells which
            return done
        done += count
    return done
