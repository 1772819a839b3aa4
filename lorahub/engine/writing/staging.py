"""A folder in the making that survives its makers: finished files are kept, everything else starts again.

It lies beside its destination under a name that follows from it, so that a second run finds it.  A journal in it says
what it is made from and which files are finished; another plan, adapter or base makes it start afresh.  One run at a
time has it, of one process or of several, each with a journal of its own, and the destination appears in one rename.
Knows file names; no tensors.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, final

from lorahub.deltas.kind import JSON
from lorahub.engine.writing.ranks import ALONE, Ranks, Roll
from lorahub.errors import WriteFailed
from lorahub.files.atomic import atomic_write, flush_folder, replace_dir, write_failed
from lorahub.files.locks import Lock

__all__ = ["SINGLE", "Staging", "staging_of"]

SINGLE = ".safetensors"
"""Ending of a destination that is one file, not a folder."""

_LOOK = 0.1  # seconds between two looks at what other processes have done


def staging_of(out: Path) -> Path:
    """Where ``out`` is prepared; ``is_partial`` knows such names."""
    return out.with_name(f".lorahub-{out.name}.partial")


@final
class Staging:
    """The folder in which ``out`` is prepared, held by one run.

    Attributes:
        folder: where files are written.
        finished: file name -> what was noted of it, for files that an earlier run of the same identity finished.
        kept: those of them that were taken over.
    """

    def __init__(self, out: Path, identity: Mapping[str, JSON], ranks: Ranks = ALONE) -> None:
        """Take over what an earlier run left, or start.

        Args:
            out: the destination; absent, or an empty folder.
            identity: JSON values that decide the content; files that were finished under another are removed.
            ranks: this process among those that prepare it together.

        Raises:
            WriteFailed: ``out`` is there already, another run has the folder, or it cannot be made.
        """
        self._out, self._identity, self._ranks = out, json.loads(json.dumps(dict(identity))), ranks
        self.folder = staging_of(out)
        self._entries: dict[str, Any] = {}
        self._roll: Roll | None = None
        _demand_free(out)
        try:
            self.folder.mkdir(exist_ok=True)
            self._lock = Lock(self.folder, shared=not ranks.alone)
            try:
                if not ranks.alone:
                    self._roll = Roll(self.folder, ranks)
                found = self._found()
                if ranks.alone:  # what others are writing cannot be told from what is left over
                    self._entries = found
                    self._remove_all_but({*found, _journal(0)})
                    self._write()
            except BaseException:
                self.release()
                raise
        except OSError as error:
            raise write_failed(self.folder, error) from None
        self.finished: Mapping[str, Any] = {name: entry["note"] for name, entry in found.items()}
        self.kept: frozenset[str] = frozenset()
        self._found_entries = found

    def take_over(self, names: Iterable[str]) -> None:
        """Say which of the ``finished`` files hold what they should and are kept; the others are removed.

        Raises:
            WriteFailed: the journal cannot be written.
        """
        self.kept = kept = frozenset(names)
        for name in self.finished.keys() - kept if self._ranks.alone else ():
            (self.folder / name).unlink(missing_ok=True)
        self._entries = {name: entry for name, entry in self._found_entries.items() if name in kept}
        self._write()

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

    def wait_for_others(self, shares: Mapping[int, Collection[str]]) -> dict[str, Any]:
        """The notes of the files that other ranks make, when all of them are finished.

        Args:
            shares: rank -> names of its files.

        Raises:
            RankFailed: one of them failed or is gone.
        """
        notes: dict[str, Any] = {}
        waiting = {rank: set(names) for rank, names in shares.items() if rank != self._ranks.rank}
        while waiting and self._roll:
            for rank, names in list(waiting.items()):
                said = self._read(_journal(rank))
                nonce = self._roll.present(rank)
                if nonce and said.get("nonce") == nonce and names <= said["finished"].keys():
                    notes |= {name: said["finished"][name]["note"] for name in names}
                    del waiting[rank]
            if waiting:
                self._roll.check()
                threading.Event().wait(_LOOK)
        return notes

    def wait_until_published(self) -> None:
        """Return when rank 0 has put the destination in place.

        Raises:
            RankFailed: it failed or is gone.
        """
        assert self._roll is not None
        while self.folder.exists():
            try:
                self._roll.check()
            except BaseException:
                if not self.folder.exists():  # it was published between the two looks
                    break
                raise
            threading.Event().wait(_LOOK)

    def publish(self, names: Collection[str]) -> None:
        """Make the folder, with the files ``names`` and nothing else, its destination; or its one file.

        Raises:
            WriteFailed: something is in the way; the folder stays.
        """
        _demand_free(self._out)
        try:
            if self._out.suffix == SINGLE:
                (name,) = names
                os.replace(self.folder / name, self._out)  # noqa: PTH105 - as the tests of crashes see it
                flush_folder(self._out.parent)
                shutil.rmtree(self.folder, ignore_errors=True)
                return
            self._remove_all_but(names)
        except OSError as error:
            raise write_failed(self._out, error) from None
        replace_dir(self.folder, self._out)

    def abandon(self, error: BaseException, *, resumable: bool) -> None:
        """Keep what is finished for the next run if it can go on from there; remove everything otherwise."""
        if self._roll:
            self._roll.fail(f"{type(error).__name__}: {error}".partition("\n")[0])
        elif not (resumable and self._entries):
            shutil.rmtree(self.folder, ignore_errors=True)  # its name says that it is unfinished, wherever it stays

    def release(self) -> None:
        """Let another run have the folder."""
        if self._roll:
            self._roll.sign_off()
        self._lock.release()

    def _write(self) -> None:
        nonce = self._roll.nonce if self._roll else ""
        content = {"identity": self._identity, "nonce": nonce, "finished": self._entries}
        atomic_write(self.folder / _journal(self._ranks.rank), json.dumps(content, sort_keys=True).encode())

    def _found(self) -> dict[str, Any]:
        """The entries of all journals there that still hold."""
        said = [self._read(path.name)["finished"] for path in sorted(self.folder.glob("journal*.json"))]
        return {name: entry for each in said for name, entry in each.items() if self._holds(name, entry)}

    def _read(self, name: str) -> dict[str, Any]:
        """A journal, or an empty one where there is none of this identity."""
        try:
            content = json.loads((self.folder / name).read_bytes())
        except (FileNotFoundError, ValueError):  # none yet, or not one of ours
            content = None
        if isinstance(content, dict) and content.get("identity") == self._identity:
            return content
        return {"finished": {}}

    def _holds(self, name: str, entry: Mapping[str, Any]) -> bool:
        path = self.folder / name
        return path.is_file() and not path.is_symlink() and _stamp(path) == entry["stamp"]

    def _remove_all_but(self, names: Collection[str]) -> None:
        """Remove files and folders that are not among ``names``, or on the way to one."""
        keep = {name.partition("/")[0] for name in names}
        for path in self.folder.iterdir():
            if path.name not in keep:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()


def _journal(rank: int) -> str:
    return f"journal-{rank}.json"


def _stamp(path: Path) -> list[int]:
    """What changes when someone writes to a file."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


def _demand_free(out: Path) -> None:
    hint = "name another place"
    if out.suffix == SINGLE:
        if out.exists() or out.is_symlink():
            raise WriteFailed(f"{out} is there already", f"{hint}, or remove it yourself")
        return
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise WriteFailed(f"{out} is there already and is no folder", hint)
    if out.is_dir() and any(out.iterdir()):
        raise WriteFailed(f"{out} is there already and is not empty", f"{hint}, or remove it yourself")
