"""One installation of a lock: what is missing is fetched first, then each folder is put in place."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

from lorahub.errors import Degraded, DigestMismatch, NotFound
from lorahub.fetching import Progress
from lorahub.files.digest import file_digest
from lorahub.files.raw import copy_range, open_regular
from lorahub.findings import Finding, Verdict
from lorahub.hub import open_hub
from lorahub.hub.hub import Hub
from lorahub.hub.noticed import commit_gone
from lorahub.manifest.lockfile import Lock, LockedAdapter, LockedComposition
from lorahub.manifest.mixing import Mix, make, mixes
from lorahub.manifest.placing import Condition, Dest, Files
from lorahub.manifest.project import Project
from lorahub.names import printable

__all__ = ["Installing", "files_of"]


@final
@dataclass(slots=True, kw_only=True)
class Installing:
    """One installation of a lock; ``lock`` is another object afterwards where a composition's output was learnt."""

    project: Project
    lock: Lock
    dest: Dest
    hub: str | None
    local_files_only: bool
    progress: Progress
    findings: list[Finding] = field(default_factory=list)
    done: dict[str, str] = field(default_factory=dict)

    def run(self) -> None:
        """Bring the folder to what is locked; where it is so already, nothing is written, not even a lock taken."""
        if self._settled():
            return
        folders = self._fetched()
        with self.dest.held():
            for each in self.lock.adapter:
                self._adapter(each, folders)
            made = mixes(self.project.manifest, self.project.folder) if self.lock.composition else {}
            for composed in self.lock.composition:
                self._composition(composed, made.get(composed.name))
            for name in self._gone():
                self._remove(name)

    def _settled(self) -> bool:
        wanted: dict[str, Files | None] = {each.name: files_of(each) for each in self.lock.adapter}
        wanted |= {each.name: self._composed_files(each) for each in self.lock.composition}
        right = all(files is not None and self.dest.condition(name, files) == "right" for name, files in wanted.items())
        if not right or self._gone() or self.dest.unfinished():
            return False
        self.done = dict.fromkeys(wanted, "kept")
        return True

    def _gone(self) -> list[str]:
        """What this manifest has installed here and does not lock any more."""
        locked = {each.name for each in self.lock.adapter} | {each.name for each in self.lock.composition}
        return [name for name in self.dest.names() if name not in locked]

    # ------------------------------------------------------------------------------------------------ adapters

    def _fetched(self) -> dict[str, Path]:
        """Every adapter that is not in place, in the cache or in the project: name -> its folder."""
        missing = [each for each in self.lock.adapter if self.dest.condition(each.name, files_of(each)) != "right"]
        for each in missing:
            self._demand_free(each.name, self.dest.condition(each.name, files_of(each)))
        return self._brought(missing)

    def _brought(self, adapters: Sequence[LockedAdapter]) -> dict[str, Path]:
        remote = [each for each in adapters if each.repo]
        total, before = sum(each.pin().size for each in remote), 0
        hub = open_hub(self.hub, local_files_only=self.local_files_only) if remote else None
        found = {each.name: self.project.folder / (each.path or "") for each in adapters if each.path}
        for each in remote:
            assert hub is not None  # it was opened for them
            found[each.name] = self._pull(hub, each, before, total)
            before += each.pin().size
        return found

    def _pull(self, hub: Hub, locked: LockedAdapter, before: int, total: int) -> Path:
        pin = locked.pin()
        try:
            return hub.pull(pin, progress=lambda _file, done, _all: self.progress(before + done, total))
        except NotFound as error:
            gone = commit_gone(pin.repo, pin.commit)
            told = (*error.findings, *([] if any(each.code == gone.code for each in error.findings) else [gone]))
            raise NotFound(
                f"{locked.name} is locked at commit {pin.commit[:12]} of {printable(pin.repo)}, which cannot be had "
                f"any more and is not in the cache: {error.message}",
                f"to lock what there is now: lorahub lock --upgrade {locked.name}",
                told,
            ) from None

    def _adapter(self, locked: LockedAdapter, folders: Mapping[str, Path]) -> None:
        name, wanted = locked.name, files_of(locked)
        condition = self.dest.condition(name, wanted)
        if condition == "right":
            note = self.dest.installed(name)
            if note is not None and wanted in note.states.values():  # looked at anew, or left by a killed run
                self.dest.remember(name, locked.digest, wanted)
            self.done[name] = "kept"
            return
        self._demand_free(name, condition)
        folder = folders[name] if name in folders else self._brought([locked])[name]

        def copied(fresh: Path) -> str:
            copy_files(folder, fresh, wanted)
            return locked.digest

        self.dest.install(name, copied)
        self.done[name] = "installed" if condition == "absent" else "replaced"

    def _demand_free(self, name: str, condition: Condition) -> None:
        if condition in {"changed", "foreign", "theirs"}:
            raise self.dest.refuse(name, condition)

    def _remove(self, name: str) -> None:
        if self.dest.remove(name):
            self.done[name] = "removed"
            return
        self.findings.append(
            Finding(
                code="folder-left",
                axis="policy",
                level=Verdict.UNVERIFIED,
                message=f"{name} is not locked any more, and its folder was changed since it was installed: it stays",
                where=(name,),
                remedy=f"remove it if nobody needs it: rm -r {shlex.quote(str(self.dest.root / name))}",
            )
        )

    # -------------------------------------------------------------------------------------------- compositions

    def _composed_files(self, locked: LockedComposition) -> Files | None:
        """The files of a composition that was made of these inputs here and came to what is locked, or None."""
        note = self.dest.installed(locked.name)
        if note is None or locked.output is None:
            return None
        return note.states.get(f"{locked.inputs} {locked.output}")

    def _composition(self, locked: LockedComposition, mix: Mix | None) -> None:
        name, files = locked.name, self._composed_files(locked)
        condition = self.dest.condition(name, files)
        if files is not None and condition == "right":
            self.dest.remember(name, f"{locked.inputs} {locked.output}", files)
            self.done[name] = "kept"
            return
        self._demand_free(name, condition)
        if mix is None or mix.recipe.fingerprint() != locked.recipe:
            raise Degraded(f"{name} is locked by another recipe than {self.project.path.name} has now", "lorahub lock")
        named = {each.name: each for each in self.lock.adapter}
        members = locked.adapter or tuple(named[member] for member in mix.members)
        self._brought(members)
        output = ""

        def composed(fresh: Path) -> str:
            nonlocal output
            made = make(
                mix, members, self.lock.base, self.project.folder, fresh, hub=self.hub, progress=self.progress
            )  # fmt: skip
            self.findings += [each for each in made.findings if each not in self.findings]
            output = made.output
            if locked.output not in (None, output):
                raise _differs(locked, output)
            return f"{locked.inputs} {output}"

        self.dest.install(name, composed)
        self.done[name] = "installed" if condition == "absent" else "replaced"
        if locked.output is None:
            known = tuple(
                each.model_copy(update={"output": output}) if each.name == name else each
                for each in self.lock.composition
            )
            self.lock = self.lock.model_copy(update={"composition": known})


def files_of(locked: LockedAdapter) -> Files:
    """The files that an adapter's folder has."""
    return {each.path: (each.size, each.sha256) for each in locked.file}


def copy_files(source: Path, target: Path, files: Files) -> None:
    """Copy files, and hold what was written against what it should be.

    Raises:
        DigestMismatch: a file is not the one that was locked.
        NotFound, AccessDenied, Unavailable, IntegrityError: it cannot be read.
        OSError: the target cannot be written.
    """
    target.mkdir()
    for path, (size, sha256) in files.items():
        place = target / path
        place.parent.mkdir(parents=True, exist_ok=True)
        with open_regular(source / path) as old, place.open("x+b", buffering=0) as new:
            copy_range(old, 0, new, 0, min(size, os.fstat(old.fileno()).st_size))
        if file_digest(place) != (sha256, size):
            raise DigestMismatch(
                f"{source / path} is not the file that was locked", "if it is as it should be: lorahub lock"
            )


def _differs(locked: LockedComposition, output: str) -> Degraded:
    finding = Finding(
        code="lock-output-differs",
        axis="integrity",
        level=Verdict.DEGRADED,
        message=f"{locked.name} came to {output}, and {locked.output} is locked: the same inputs in another "
        "environment (torch, its libraries, the processor) may differ in the last bits",
        where=(locked.name,),
        remedy=f"to lock what comes of it here: lorahub lock --upgrade {locked.name}",
    )
    return Degraded(f"{locked.name} did not come to what is locked", finding.remedy, (finding,))
