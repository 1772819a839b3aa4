"""One run of locking: the base, every adapter and composition of a manifest, kept or resolved, and judged."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import final

from lorahub.errors import Offline
from lorahub.fetching import Progress
from lorahub.findings import Finding, Verdict
from lorahub.hub import open_hub
from lorahub.hub.hub import Hub
from lorahub.manifest.document import FILENAME
from lorahub.manifest.lockfile import CREATED_BY, Lock, LockedAdapter, LockedBase, LockedComposition
from lorahub.manifest.mixing import Mix, mixes
from lorahub.manifest.pinning import Pinned, against, pin_entry, satisfies
from lorahub.manifest.policy import demand, judge, offences
from lorahub.manifest.project import Project
from lorahub.merging import checking
from lorahub.names import Ref
from lorahub.opening import Base, open_base

__all__ = ["Resolving"]


_NO_BASE = Finding(
    code="base-unnamed",
    axis="base",
    level=Verdict.UNVERIFIED,
    message=f"{FILENAME} names no base, so no adapter was held against one",
    remedy="lorahub add --base ORG/NAME",
)


@final
@dataclass(slots=True, kw_only=True)
class Resolving:
    """One run of locking."""

    project: Project
    old: Lock | None
    upgrade: bool | Collection[str]
    hub: str | None
    local_files_only: bool
    progress: Progress
    findings: list[Finding] = field(default_factory=list)
    why: dict[str, str] = field(default_factory=dict)
    opened: Hub | None = None
    opened_base: Base | None = None
    base: LockedBase | None = None
    rebased: bool = False

    def run(self) -> Lock:
        """The new lock; nothing is written."""
        manifest, old = self.project.manifest, self.old
        made = mixes(manifest, self.project.folder)
        self.base = self._base()
        self.rebased = old is not None and not _equal_bases(old.base, self.base)
        known = {each.name: each for each in old.adapter} if old else {}
        adapters = tuple(
            self._adapter(name, entry.ref, known.get(name), anew=self._asked(name))
            for name, entry in sorted(manifest.entries().items())
        )
        compositions = tuple(self._composition(each, adapters) for each in made.values())
        every = [*adapters, *(inner for each in compositions for inner in each.adapter)]
        demand(offences(manifest.policy, every))
        if self.base is None and every:
            self.findings.append(_NO_BASE)
        judged = {id(each): self._judged(each) for each in every}
        fields = {
            "manifest": manifest.fingerprint(),
            "base": self.base,
            "adapter": tuple(judged[id(each)] for each in adapters),
            "composition": tuple(
                each.model_copy(update={"adapter": tuple(judged[id(inner)] for inner in each.adapter)})
                for each in compositions
            ),
        }
        start = old or Lock(manifest=manifest.fingerprint())
        return start.model_copy(update={**fields, "created_by": CREATED_BY})

    def _say(self, name: str, findings: Sequence[Finding]) -> None:
        """Keep what there is to say of an adapter; what is so of several is said once, of them all."""
        for each in findings:
            same = [
                at for at, known in enumerate(self.findings) if (known.code, known.message) == (each.code, each.message)
            ]
            if not same:
                self.findings.append(replace(each, where=(name,)))
            elif name not in self.findings[same[0]].where:
                known = self.findings[same[0]]
                self.findings[same[0]] = replace(known, where=(*known.where, name))

    def _asked(self, name: str) -> bool:
        return self.upgrade if isinstance(self.upgrade, bool) else name in self.upgrade

    def _hub(self) -> Hub:
        if self.opened is None:
            self.opened = open_hub(self.hub, local_files_only=self.local_files_only)
        return self.opened

    # ------------------------------------------------------------------------------------------------ the base

    def _base(self) -> LockedBase | None:
        ref = self.project.manifest.base_ref()
        if ref is None:
            return None
        old = self.old.base if self.old else None
        if old is not None and old.requested == str(ref) and old.repo and not self._asked("base"):
            return old
        index = self._open_base(ref).index
        new = LockedBase(
            requested=str(ref),
            repo=index.ref.repo or None,
            path=ref.path,
            commit=index.ref.commit or None,
            weights=index.weights or None,
            structure=index.structure or None,
        )
        return old if old is not None and _named(old) == _named(new) else new

    def _open_base(self, ref: Ref) -> Base:
        """The base by its headers and digests."""
        if self.opened_base is None:
            if ref.path is None and self.local_files_only:
                raise Offline(f"the base {ref} has to be looked at, and the network is switched off", "lorahub lock")
            place = ref if ref.path is None else Ref(path=os.path.abspath(self.project.folder / ref.path))  # noqa: PTH100 - Path.resolve would follow links
            self.opened_base = open_base(place, digest=True, hub=self.hub, progress=self.progress)
            self.findings += [each for each in self.opened_base.findings if each.level >= Verdict.UNVERIFIED]
        return self.opened_base

    def _locked_base(self) -> Base:
        assert self.base is not None  # nothing is held against none
        return self._open_base(self.base.reference(self.project.folder))

    # ---------------------------------------------------------------------------------------------- an adapter

    def _adapter(self, name: str, requested: str, old: LockedAdapter | None, *, anew: bool) -> LockedAdapter:
        """What is locked, where it still fits; else what the reference comes to now."""
        ref = Ref.parse(requested)
        if old is not None and not anew and ref.path is None and satisfies(ref, old):
            return old if old.requested == requested else old.model_copy(update={"requested": requested})
        found: Pinned = pin_entry(self._hub, self.project.folder, name, requested)
        if old is not None:
            found = against(old, found)
        self._say(name, found.said)
        self.why[name] = found.why
        said = [each for each in found.said if each.level >= Verdict.DEGRADED]
        if said:
            judge(name, said, self.project.manifest.policy)
        same = old is not None and _key(old) == _key(found.locked)
        return old.model_copy(update={"requested": requested}) if same and old is not None else found.locked

    def _judged(self, locked: LockedAdapter) -> LockedAdapter:
        """The adapter with its verdict against the locked base."""
        policy = self.project.manifest.policy
        if self.base is None:
            return locked.model_copy(update={"verdict": None})
        if locked.verdict is not None and not self.rebased and locked.verdict <= policy.worst:
            return locked
        source = self._source(locked)
        report = checking.check(source, self._locked_base(), hub=self.hub, progress=self.progress)
        self._say(locked.name, [each for each in report.findings if each.level >= Verdict.UNVERIFIED])
        return locked.model_copy(update={"verdict": judge(locked.name, report.findings, policy)})

    def _source(self, locked: LockedAdapter) -> Ref | Path:
        if locked.repo is None:
            place = self.project.folder / (locked.path or "")
            return place / locked.weight_name if locked.weight_name else place
        if self.local_files_only:
            return self._hub().pull(locked.pin()) / (locked.weight_name or "")
        return Ref(repo=locked.repo, selector=locked.commit, subpath=locked.pin().path)

    # ------------------------------------------------------------------------------------------- a composition

    def _composition(self, mix: Mix, adapters: Collection[LockedAdapter]) -> LockedComposition:
        old = next((each for each in (self.old.composition if self.old else ()) if each.name == mix.name), None)
        known = {each.name: each for each in old.adapter} if old else {}
        own = tuple(
            self._adapter(label, ref, known.get(label), anew=self._asked(mix.name)) for label, ref in mix.own.items()
        )
        named = {each.name: each for each in adapters}
        members = [*own, *(named[name] for name in mix.members)]
        inputs = mix.inputs([each.digest for each in members], self.base)
        recipe = mix.recipe.fingerprint()
        if old is not None and (old.inputs, old.recipe) == (inputs, recipe) and not self._asked(mix.name):
            return old.model_copy(update={"adapter": own})
        return LockedComposition(name=mix.name, recipe=recipe, inputs=inputs, adapter=own)


def _key(locked: LockedAdapter) -> tuple[object, ...]:
    """What makes two locked adapters the same state."""
    files = {each.path: (each.size, each.sha256) for each in locked.file}
    return locked.repo, locked.path, locked.commit, locked.resolved, locked.subfolder, locked.weight_name, files


def _named(base: LockedBase) -> tuple[object, ...]:
    return base.requested, base.repo, base.path, base.commit, base.weights, base.structure


def _equal_bases(one: LockedBase | None, other: LockedBase | None) -> bool:
    """Whether a verdict against the one holds against the other: equal weights, wherever they lie."""
    if one is None or other is None:
        return one is other
    return one.weights is not None and (one.weights, one.structure) == (other.weights, other.structure)
