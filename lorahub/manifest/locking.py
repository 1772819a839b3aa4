"""``lorahub lock``: what a manifest's references come to, written down; what is locked and still fits stays."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorahub.errors import UsageError
from lorahub.fetching import Progress, quiet
from lorahub.findings import Finding
from lorahub.manifest.changes import Change, changes, demand_current
from lorahub.manifest.document import FILENAME, Manifest
from lorahub.manifest.lockfile import Lock
from lorahub.manifest.project import Project
from lorahub.manifest.resolving import Resolving
from lorahub.names import did_you_mean, printable

__all__ = ["Locked", "lock", "relock"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Locked:
    """What locking came to.

    Attributes:
        path: where the lock lies.
        lock: what it says.
        changes: what it says otherwise than before of adapters, bases and compositions.
        findings: what there is to say of what was looked at.
        written: whether the file was written: a range that changed and means the same version is no change.
    """

    path: Path
    lock: Lock
    changes: tuple[Change, ...]
    findings: tuple[Finding, ...] = ()
    written: bool = False

    def document(self) -> dict[str, Any]:
        """The outcome as JSON-ready values."""
        return {
            "lock": os.fspath(self.path),
            "changes": [each.document() for each in self.changes],
            "adapters": [
                {
                    "name": each.name,
                    "from": each.place(),
                    "requested": each.requested,
                    "commit": each.commit,
                    "digest": each.digest,
                    "verdict": str(each.verdict) if each.verdict is not None else None,
                }
                for each in self.lock.adapter
            ],
            "findings": [each.document() for each in self.findings],
        }


def lock(
    *,
    upgrade: bool | Collection[str] = False,
    check: bool = False,
    manifest: str | os.PathLike[str] | None = None,
    hub: str | None = None,
    local_files_only: bool = False,
    progress: Progress = quiet,
) -> Locked:
    """Resolve a manifest's references and write its lock; no weights are downloaded, no torch.

    What is locked and still fits stays, so that a newer version changes nothing until it is asked for.

    Args:
        upgrade: resolve anew, within what the manifest says: all of it, or these names ("base" is the base).
        check: write nothing and ask nobody; refuse where manifest and lock disagree.
        manifest: its file or folder; None takes the nearest ``lorahub.toml`` from the current folder upwards.
        hub: path of a folder hub; None takes ``LORAHUB_HUB``, else Hugging Face.
        local_files_only: use the cache alone.
        progress: called with (bytes done, bytes in all).

    Raises:
        UsageError, ManifestError: there is no manifest, or it is none.
        RecordError: what lies beside it is no lock.
        Degraded: an adapter is refused by the policy, or ``check`` found a difference; nothing was written.
        BaseMismatch, Incompatible, IntegrityError: an adapter cannot be used with the base.
        NotFound, AccessDenied, Offline, Unavailable: something cannot be had from here.
    """
    project = Project.open(manifest)
    if check:
        found = project.lock()
        demand_current(project, found)
        assert found is not None  # none is no current lock
        return Locked(path=project.lock_path, lock=found, changes=())
    return relock(project, upgrade=upgrade, hub=hub, local_files_only=local_files_only, progress=progress)


def relock(
    project: Project,
    *,
    upgrade: bool | Collection[str] = False,
    hub: str | None = None,
    local_files_only: bool = False,
    progress: Progress = quiet,
    before: Callable[[], object] | None = None,
) -> Locked:
    """``lock`` of a project at hand; ``before`` runs when all is decided and nothing is written yet."""
    manifest, old = project.manifest, project.lock()
    _demand_known(manifest, upgrade)
    job = Resolving(
        project=project, old=old, upgrade=upgrade, hub=hub, local_files_only=local_files_only, progress=progress
    )
    new = job.run()
    told = tuple(changes(old, new, job.why))
    if before is not None:
        before()
    if old is not None and _same(old, new):
        return Locked(path=project.lock_path, lock=old, changes=(), findings=tuple(job.findings))
    new.save(project.lock_path)
    return Locked(path=project.lock_path, lock=new, changes=told, findings=tuple(job.findings), written=True)


def _demand_known(manifest: Manifest, upgrade: bool | Collection[str]) -> None:
    if isinstance(upgrade, bool):
        return
    names = [*manifest.adapters, *manifest.compositions, *(["base"] if manifest.base is not None else [])]
    if unknown := sorted(set(upgrade) - set(names)):
        raise UsageError(
            f"{FILENAME} has no '{printable(unknown[0])}' to upgrade.{did_you_mean(unknown[0], names)}",
            f"it has {', '.join(names)}" if names else f"lorahub add {printable(unknown[0])}",
        )


def _same(old: Lock, new: Lock) -> bool:
    """Whether only the program that wrote it differs, which is no reason to write."""
    return old.model_copy(update={"created_by": new.created_by}).to_toml() == new.to_toml()
