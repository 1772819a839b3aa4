"""What a lock says otherwise: than the one before it, and than its manifest.  Asks no hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from lorahub.errors import Degraded, LorahubError
from lorahub.findings import Finding, Verdict
from lorahub.manifest.lockfile import Lock, LockedAdapter
from lorahub.manifest.mixing import mixes
from lorahub.manifest.pinning import local_files
from lorahub.manifest.project import Project

__all__ = ["Change", "changes", "demand_current", "differences"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One line of what a lock says otherwise than before.

    Attributes:
        name: the adapter, the composition, or "base".
        what: "added", "removed", "updated" or "checked" (the same state, another verdict).
        before, after: where it came from and comes from now, or "".
        why: how that was decided, or "".
    """

    name: str
    what: str
    before: str = ""
    after: str = ""
    why: str = ""

    def document(self) -> dict[str, str]:
        """The change as JSON-ready values."""
        return {"name": self.name, "what": self.what, "before": self.before, "after": self.after, "why": self.why}


def changes(old: Lock | None, new: Lock, why: Mapping[str, str]) -> Iterator[Change]:
    """What the new lock says otherwise."""
    before, after = _rows(old), _rows(new)
    for name in sorted({*before, *after}):
        one, other = before.get(name, ""), after.get(name, "")
        if one != other:
            what = "added" if not one else "removed" if not other else "updated"
            yield Change(name=name, what=what, before=one, after=other, why=why.get(name, ""))
    verdicts = [{each.name: each.verdict for each in lock.adapter} if lock else {} for lock in (old, new)]
    for name, verdict in verdicts[1].items():
        if name in verdicts[0] and verdicts[0][name] != verdict and before.get(name) == after.get(name):
            yield Change(name=name, what="checked", before=_word(verdicts[0][name]), after=_word(verdict))


def _rows(lock: Lock | None) -> dict[str, str]:
    if lock is None:
        return {}
    rows = {each.name: f"{each.place()} {each.digest[7:19]}" for each in lock.adapter}
    rows |= {each.name: f"composed, inputs {each.inputs[7:19]}" for each in lock.composition}
    base = lock.base
    return (
        {**rows, "base": f"{base.repo}@{(base.commit or '')[:12]}" if base.repo else base.path or ""} if base else rows
    )


def differences(project: Project, lock: Lock | None) -> list[str]:
    """Why a lock is not that of its manifest, in words; asks no hub."""
    if lock is None:
        return [f"there is no {project.lock_path.name}"]
    found = []
    if lock.manifest != project.manifest.fingerprint():
        wanted = {name: each.ref for name, each in project.manifest.entries().items()}
        have = {each.name: each.requested for each in lock.adapter}
        found += [f"{name} is not locked" for name in wanted if name not in have]
        found += [f"{name} is locked, and not in the manifest" for name in have if name not in wanted]
        found += [
            f"{name} is {wanted[name]} now, and was locked as {have[name]}"
            for name in wanted
            if name in have and wanted[name] != have[name]
        ]
        found = found or ["the manifest says something else than was locked"]
    made = mixes(project.manifest, project.folder)
    for one in lock.composition:
        if one.name in made and made[one.name].recipe.fingerprint() != one.recipe:
            found.append(f"the recipe of {one.name} says something else than was locked")
    found += [f"{each.path} has other files than were locked" for each in lock.places() if _changed(project, each)]
    return list(dict.fromkeys(found))


def demand_current(project: Project, lock: Lock | None) -> None:
    """Refuse a lock that is not its manifest's.

    Raises:
        Degraded: it is not, with every difference.
    """
    if found := differences(project, lock):
        findings = tuple(
            Finding(code="lock-outdated", axis="integrity", level=Verdict.DEGRADED, message=each, remedy="lorahub lock")
            for each in found
        )
        raise Degraded(
            f"{project.lock_path.name} is not that of {project.path.name}: {found[0]}", "lorahub lock", findings
        )


def _changed(project: Project, locked: LockedAdapter) -> bool:
    """Whether a local adapter has other files than were locked."""
    if locked.path is None:
        return False
    try:
        chosen, _ = local_files(project.folder, "/".join(filter(None, [locked.path, locked.weight_name])))
    except LorahubError:  # not there, or no adapter any more
        return True
    return {path: file.sha256 for path, file in chosen.files.items()} != {f.path: f.sha256 for f in locked.file}


def _word(verdict: Verdict | None) -> str:
    return "not checked" if verdict is None else str(verdict)
