"""``lorahub sync``: exactly what is locked, installed as one folder for each adapter.

Pins name every file by its sha256, so what is installed is a function of the lock; where all of it is in place, or in
the cache, no hub is asked.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from lorahub.errors import UsageError
from lorahub.fetching import Progress, quiet
from lorahub.findings import Finding
from lorahub.manifest.changes import Change, demand_current, differences
from lorahub.manifest.installing import Installing
from lorahub.manifest.locking import relock
from lorahub.manifest.placing import Dest
from lorahub.manifest.project import Project

__all__ = ["Synced", "sync"]


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Synced(Mapping[str, Path]):
    """What is installed: name -> folder, as ``lorahub.attach`` and ``lorahub.merge`` take it; and what was done.

    Attributes:
        dest: the folder they lie in.
        folders: name -> folder, adapters first, then compositions.
        weights: name -> the weight that the manifest gives it, where it gives one.
        done: name -> "kept", "installed", "replaced" or "removed".
        changes: what locking changed first, if it had to.
        findings: what there is to say.
    """

    dest: Path
    folders: Mapping[str, Path]
    weights: Mapping[str, float]
    done: Mapping[str, str]
    changes: tuple[Change, ...] = ()
    findings: tuple[Finding, ...] = ()

    def __getitem__(self, name: str) -> Path:
        return self.folders[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.folders)

    def __len__(self) -> int:
        return len(self.folders)

    def document(self) -> dict[str, Any]:
        """The outcome as JSON-ready values."""
        return {
            "dest": os.fspath(self.dest),
            "folders": {name: os.fspath(folder) for name, folder in self.folders.items()},
            "done": dict(self.done),
            "changes": [each.document() for each in self.changes],
            "findings": [each.document() for each in self.findings],
        }


def sync(
    *,
    dest: str | os.PathLike[str] | None = None,
    locked: bool = False,
    frozen: bool = False,
    manifest: str | os.PathLike[str] | None = None,
    hub: str | None = None,
    local_files_only: bool = False,
    progress: Progress = quiet,
) -> Synced:
    """Install what a manifest locks, one verified folder for each adapter; lock first where the manifest changed.

    A folder that is right stays as it is, and asks nobody.  Folders that are not from here, or were changed since, are
    neither replaced nor removed.  A run that was killed is finished by the next one.

    Args:
        dest: where to; None takes the folder ``adapters`` beside the manifest.  vLLM's filesystem resolver reads it.
        locked: refuse where manifest and lock disagree, instead of locking.
        frozen: take the lock as it is, whatever the manifest says now.
        manifest: its file or folder; None takes the nearest ``lorahub.toml`` from the current folder upwards.
        hub: path of a folder hub; None takes ``LORAHUB_HUB``, else Hugging Face.
        local_files_only: use the cache alone.
        progress: called with (bytes done, bytes in all).

    Raises:
        UsageError, ManifestError, RecordError: manifest or lock are not there, or are none.
        Degraded: with ``locked``, they disagree; or a composition came to something else than was locked.
        DigestMismatch, IntegrityError: a file is not the one that was locked.
        NotFound, AccessDenied, Offline, Unavailable: it cannot be had from here; "commit-gone" among the findings
            says that its history was rewritten.
        WriteFailed: there is no space, or something that is not ours is in the way.
    """
    if locked and frozen:
        raise UsageError("--locked compares manifest and lock, --frozen does not look", "give one of the two")
    project = Project.open(manifest)
    lock, changes, findings = project.lock(), tuple[Change, ...](), tuple[Finding, ...]()
    if locked:
        demand_current(project, lock)
    if lock is None and frozen:
        raise UsageError(f"there is no {project.lock_path.name} beside {project.path}", "lorahub lock")
    if not (locked or frozen) and differences(project, lock):
        made = relock(project, hub=hub, local_files_only=local_files_only, progress=progress)
        lock, changes, findings = made.lock, made.changes, made.findings
    assert lock is not None  # without one, one was made or refused above
    root = project.dest(dest)
    owner = os.path.relpath(project.path.absolute(), root.absolute())
    job = Installing(
        project=project,
        lock=lock,
        dest=Dest(root, Path(owner).as_posix()),
        hub=hub,
        local_files_only=local_files_only,
        progress=progress,
        findings=[*findings],
    )
    job.run()
    if job.lock is not lock and not (locked or frozen):
        job.lock.save(project.lock_path)
    names = [*(each.name for each in lock.adapter), *(each.name for each in lock.composition)]
    return Synced(
        dest=root,
        folders={name: root / name for name in names},
        weights={name: each.weight for name, each in project.manifest.entries().items() if each.weight != 1},
        done=dict(sorted(job.done.items())),
        changes=changes,
        findings=tuple(job.findings),
    )
