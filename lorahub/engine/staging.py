"""A folder in the making that survives its maker: finished files are kept, everything else starts again.

It lies beside its destination under a name that follows from it, so that a second run finds it.  A journal in it says
what it is made from and which files are finished; another plan, adapter or base makes it start afresh.  One run at a
time has it, and the destination appears in one rename.  Knows file names; no tensors.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from lorahub.deltas.kind import JSON
from lorahub.errors import WriteFailed
from lorahub.files.atomic import atomic_write, replace_dir, write_failed

if sys.platform != "win32":  # there two runs to one destination are not kept apart
    import fcntl

__all__ = ["Staging", "staging_of"]

_JOURNAL = "journal.json"


def staging_of(out: Path) -> Path:
    """Where ``out`` is prepared; ``is_partial`` knows such names."""
    return out.with_name(f".lorahub-{out.name}.partial")


@final
class Staging:
    """The folder in which ``out`` is prepared, held by one run.

    Attributes:
        folder: where files are written.
        finished: file name -> what was noted of it, for files that an earlier run of the same identity finished.
    """

    def __init__(self, out: Path, identity: Mapping[str, JSON]) -> None:
        """Take over what an earlier run left, or start.

        Args:
            out: the destination; absent, or an empty folder.
            identity: JSON values that decide the content; files that were finished under another are removed.

        Raises:
            WriteFailed: ``out`` is there already, another run has the folder, or it cannot be made.
        """
        self._out, self._identity = out, dict(identity)
        self.folder = staging_of(out)
        self._journal = self.folder / _JOURNAL
        _demand_free(out)
        try:
            self.folder.mkdir(exist_ok=True)
            self._lock = _lock(self.folder)
            try:
                self._entries = self._take_over()
                self._write()
            except BaseException:
                self.release()
                raise
        except OSError as error:
            raise write_failed(self.folder, error) from None
        self.finished: Mapping[str, Any] = {name: entry["note"] for name, entry in self._entries.items()}

    def finish(self, name: str, note: JSON) -> None:
        """Record that a file is whole and on the disk; one thread at a time.

        Raises:
            WriteFailed: the journal cannot be written.
        """
        try:
            self._entries[name] = {"stamp": _stamp(self.folder / name), "note": note}
        except OSError as error:
            raise write_failed(self.folder / name, error) from None
        self._write()

    def publish(self) -> None:
        """Make the folder its destination.

        Raises:
            WriteFailed: something is in the way; the folder stays.
        """
        _demand_free(self._out)
        try:
            self._journal.unlink()
        except OSError as error:
            raise write_failed(self._journal, error) from None
        replace_dir(self.folder, self._out)

    def abandon(self, *, resumable: bool) -> None:
        """Keep what is finished for the next run if it can go on from there; remove everything otherwise."""
        if not (resumable and self._entries):
            shutil.rmtree(self.folder, ignore_errors=True)  # its name says that it is unfinished, wherever it stays

    def release(self) -> None:
        """Let another run have the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _write(self) -> None:
        content = {"identity": self._identity, "finished": self._entries}
        atomic_write(self._journal, json.dumps(content, sort_keys=True).encode())

    def _take_over(self) -> dict[str, Any]:
        """The journal's entries that still hold; every other file is removed."""
        entries = {name: entry for name, entry in self._read().items() if self._holds(name, entry)}
        for path in self.folder.iterdir():
            if path.name not in {*entries, _JOURNAL}:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
        return entries

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self._journal.read_bytes())
        except (FileNotFoundError, ValueError):  # none yet, or not one of ours
            return {}
        same = isinstance(content, dict) and content.get("identity") == json.loads(json.dumps(self._identity))
        return dict(content["finished"]) if same else {}

    def _holds(self, name: str, entry: Mapping[str, Any]) -> bool:
        path = self.folder / name
        return path.is_file() and not path.is_symlink() and _stamp(path) == entry["stamp"]


def _stamp(path: Path) -> list[int]:
    """What changes when someone writes to a file."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


def _demand_free(out: Path) -> None:
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise WriteFailed(f"{out} is there already and is no folder", "name another place")
    if out.is_dir() and any(out.iterdir()):
        raise WriteFailed(f"{out} is there already and is not empty", "name another place, or remove it yourself")


def _lock(folder: Path) -> int | None:
    """Hold a folder until the returned handle is closed or the process ends; None where the system has no such locks.

    The lock is on the folder itself, so it goes along when the folder is renamed, and leaves nothing behind.
    """
    if sys.platform == "win32":
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        gone = not folder.exists() or not os.path.samestat(os.fstat(handle), folder.stat())
    except BlockingIOError:
        gone = True
    except OSError:  # a file system without locks
        os.close(handle)
        return None
    if gone:
        os.close(handle)
        raise WriteFailed(f"another run is writing to {folder}", "wait for it, or name another place")
    return handle
