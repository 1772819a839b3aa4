"""Make files and folders appear whole or not at all.

What is being written lies beside its destination under a name that ``is_partial`` knows, is flushed to the disk, and
is then renamed into place.  A killed process leaves at most such a partial file, never a torn one.
"""

from __future__ import annotations

import errno
import io
import os
import secrets
import shlex
from contextlib import suppress
from pathlib import Path

from lorahub.errors import WriteFailed
from lorahub.files.raw import Bytes, write_at

__all__ = [
    "atomic_write",
    "flush",
    "flush_folder",
    "is_partial",
    "new_partial",
    "new_staging",
    "put_in_place",
    "replace_dir",
    "write_failed",
]

_PREFIX, _SUFFIX = ".lorahub-", ".partial"

_HINTS: dict[int, str] = {
    errno.ENOSPC: "free some space, or write to another disk",
    errno.EDQUOT: "free some of your quota, or write to another disk",
    errno.EFBIG: "the file system or a limit (ulimit -f) forbids files of this size: write elsewhere",
    errno.EACCES: "look at the permissions of the folder: ls -ld",
    errno.EPERM: "look at the permissions of the folder: ls -ld",
    errno.EROFS: "the file system is read-only: write elsewhere",
    errno.ENOENT: "make the folder first: mkdir -p {folder}",
    errno.ENOTDIR: "a part of the path is a file: name another place",
    errno.EISDIR: "a folder has this name: name another place",
    errno.ENOTEMPTY: "the folder is not empty: name another place, or empty it yourself",
    errno.EEXIST: "something has this name: name another place, or remove it yourself",
    errno.EXDEV: "the two places must lie on one file system",
    errno.ENAMETOOLONG: "name a shorter path",
    errno.EMFILE: "too many files are open: raise ulimit -n",
}


def write_failed(path: str | os.PathLike[str], error: OSError) -> WriteFailed:
    """The typed error for what the system said while ``path`` was written."""
    folder = Path(path).parent
    hint = _HINTS.get(error.errno or 0, "").replace("{folder}", shlex.quote(os.fspath(folder)))
    if error.errno == errno.ENOENT and folder.is_dir():
        hint = "this folder takes no new files: name another place"
    return WriteFailed(f"{os.fspath(path)} cannot be written: {error.strerror or error}", hint)


def is_partial(name: str) -> bool:
    """Whether a file or folder of this name is an unfinished one: never read, never push, free to remove."""
    return name.startswith(_PREFIX) and name.endswith(_SUFFIX)


def _partial_beside(path: Path) -> Path:
    return path.with_name(f"{_PREFIX}{secrets.token_hex(8)}{_SUFFIX}")


def new_partial(path: Path) -> tuple[io.FileIO, Path]:
    """Create an empty file beside ``path``, to be written and then put in place: (file, where it lies).

    Raises:
        OSError: as the system gives it.
    """
    partial = _partial_beside(path)
    return partial.open("x+b", buffering=0), partial  # permissions follow the umask, as for any new file


def flush(file: io.FileIO) -> None:
    """Bring what was written to the disk itself."""
    os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, where the platform can."""
    if os.name == "nt":  # folders cannot be opened there
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # some network file systems do without
            raise
    finally:
        os.close(handle)


def put_in_place(partial: Path, path: Path) -> None:
    """Rename a flushed file over ``path`` and make the rename last.

    Raises:
        OSError: as the system gives it; ``path`` is then as it was.
    """
    partial.replace(path)
    flush_folder(path.parent)


def atomic_write(path: str | os.PathLike[str], data: Bytes) -> None:
    """Write a whole file; whoever looks sees the old content or the new, also after a crash.

    Raises:
        WriteFailed: it could not be written; the old content stays.
    """
    path = Path(path)
    try:
        file, partial = new_partial(path)
        try:
            with file:
                write_at(file, 0, data)
                flush(file)
            put_in_place(partial, path)
        except BaseException:
            with suppress(OSError):
                partial.unlink()
            raise
    except OSError as error:
        raise write_failed(path, error) from None


def new_staging(final: str | os.PathLike[str]) -> Path:
    """Create an empty folder beside ``final``, to be filled and then given to ``replace_dir``.

    Raises:
        WriteFailed: it could not be created.
    """
    staging = _partial_beside(Path(final))
    try:
        staging.mkdir()
    except OSError as error:
        raise write_failed(final, error) from None
    return staging


def replace_dir(staging: str | os.PathLike[str], final: str | os.PathLike[str]) -> None:
    """Rename a finished folder, whose files are flushed, to ``final``, which must be absent or an empty folder.

    Raises:
        WriteFailed: something is in the way; both stay as they were.
    """
    staging, final = Path(staging), Path(final)
    try:
        flush_folder(staging)
        if os.name == "nt" and final.is_dir():  # a rename never replaces a folder there
            final.rmdir()
        staging.rename(final)
        flush_folder(final.parent)
    except OSError as error:
        raise write_failed(final, error) from None
