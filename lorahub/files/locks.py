"""One process at a time has a folder: a lock that ends with its holder.  Knows nothing of what the folder is for."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import final

from lorahub.errors import WriteFailed

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

__all__ = ["Lock"]


@final
class Lock:
    """A folder held until ``release``, or until the process ends.

    On a file system that has no locks nothing is held, and nothing is refused.
    """

    def __init__(self, folder: Path, *, shared: bool = False) -> None:
        """Take it.

        Args:
            folder: what to hold; on systems other than Windows it may be a file.
            shared: others may share it; on Windows nothing is held then.

        Raises:
            WriteFailed: another process has it.
            OSError: the folder cannot be opened.
        """
        self._handle = _hold(folder, shared)

    def release(self) -> None:
        """Let another have the folder; twice does no harm."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


if sys.platform == "win32":  # a folder cannot be opened there, so a file beside it stands for it

    def _hold(folder: Path, shared: bool) -> int | None:
        if shared or folder.is_file():
            return None
        beside = folder.with_name(f".lorahub-{folder.name}.lock")
        handle = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_TEMPORARY)  # gone with the last handle
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            os.close(handle)
            raise _taken(folder) from None
        return handle

else:

    def _hold(folder: Path, shared: bool) -> int | None:
        # The lock is on the folder itself, so it goes along when the folder is renamed, and leaves nothing behind.
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            gone = not folder.exists() or not os.path.samestat(os.fstat(handle), folder.stat())
        except BlockingIOError:
            gone = True
        except OSError:  # a file system without locks
            os.close(handle)
            return None
        if gone:
            os.close(handle)
            raise _taken(folder)
        return handle


def _taken(folder: Path) -> WriteFailed:
    return WriteFailed(f"another run is writing to {folder}", "wait for it, or name another place")
