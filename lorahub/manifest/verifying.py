"""``lorahub verify``: every installed file read again and held against the lock; asks no hub and writes nothing."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from lorahub.errors import LorahubError, UsageError
from lorahub.fetching import Progress, quiet
from lorahub.files.digest import file_digest
from lorahub.hub.contents import rule_for
from lorahub.manifest.installing import files_of
from lorahub.manifest.lockfile import Lock
from lorahub.manifest.placing import Dest, Files, below
from lorahub.manifest.project import Project

__all__ = ["Checked", "State", "Verified", "verify"]

State: TypeAlias = Literal["ok", "changed", "missing", "extra"]

_HARMLESS = frozenset({"document", "picture", "leftover"})
"""Roles of files that may lie beside an adapter's without changing what is loaded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """One file.

    Attributes:
        name: the adapter.
        path: within its folder.
        state: as it was locked, with other content or unreadable, not there, or not in the lock.
        harmless: of an extra one: nobody would load it.
    """

    name: str
    path: str
    state: State
    harmless: bool = False

    @property
    def ok(self) -> bool:
        """Whether the folder is still what was locked, as far as this file goes."""
        return self.state == "ok" or self.harmless


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What verifying found: every file, by adapter and path."""

    dest: Path
    files: tuple[Checked, ...]

    @property
    def ok(self) -> bool:
        """Whether everything is as it was locked."""
        return all(each.ok for each in self.files)

    def document(self) -> dict[str, Any]:
        """The outcome as JSON-ready values."""
        return {
            "dest": os.fspath(self.dest),
            "ok": self.ok,
            "files": [{"adapter": each.name, "path": each.path, "state": each.state} for each in self.files],
        }


def verify(
    *,
    dest: str | os.PathLike[str] | None = None,
    manifest: str | os.PathLike[str] | None = None,
    progress: Progress = quiet,
) -> Verified:
    """Hash every installed file and hold it against the lock.

    The files of a composition are held against what was written down when it was composed here.

    Args:
        dest: where adapters were installed; None takes the folder ``adapters`` beside the manifest.
        manifest: its file or folder; None takes the nearest ``lorahub.toml`` from the current folder upwards.
        progress: called with (bytes done, bytes in all).

    Raises:
        UsageError, ManifestError, RecordError: manifest or lock are not there, or are none.
    """
    project = Project.open(manifest)
    lock, root = project.lock(), project.dest(dest)
    if lock is None:
        raise UsageError(f"there is no {project.lock_path.name} beside {project.path}", "lorahub sync")
    wanted, unknown = _wanted(lock, Dest(root, ""))
    total, done = sum(size for files in wanted.values() for size, _ in files.values()), 0
    found = [Checked(name=name, path=".", state="missing") for name in unknown]
    for name, files in sorted(wanted.items()):
        for path, (size, sha256) in sorted(files.items()):
            found.append(Checked(name=name, path=path, state=_state(root / name / path, size, sha256)))
            done += size
            progress(done, total)
        extra = below(root / name) - set(files)
        found += [
            Checked(name=name, path=path, state="extra", harmless=rule_for(path).role in _HARMLESS)
            for path in sorted(extra)
        ]
    return Verified(dest=root, files=tuple(found))


def _wanted(lock: Lock, dest: Dest) -> tuple[dict[str, Files], list[str]]:
    """Name -> the files it should have; and compositions that were not composed here, or came to something else."""
    wanted, unknown = {each.name: files_of(each) for each in lock.adapter}, []
    for each in lock.composition:
        note = dest.installed(each.name)
        known = note.states.get(f"{each.inputs} {each.output}") if note else None
        if known is None:
            unknown.append(each.name)
        else:
            wanted[each.name] = known
    return wanted, unknown


def _state(path: Path, size: int, sha256: str) -> State:
    if not os.path.lexists(path):
        return "missing"
    if path.is_symlink() or not path.is_file() or path.stat().st_size != size:
        return "changed"
    try:
        return "ok" if file_digest(path) == (sha256, size) else "changed"
    except LorahubError:  # it cannot be read, and so not be what it was
        return "changed"
