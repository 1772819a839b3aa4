"""Does this adapter go with this base?  Six axes, one verdict, every reason with its evidence.

Policy lives here and nowhere else: which observation is exact, unverified, degraded or incompatible.  The engine
refuses only what it cannot execute.  Works from headers, records and digests; no weights, no torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from importlib import metadata
from typing import Protocol

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet

from lorahub.adapter import AdapterHeader
from lorahub.bases.framework import Framework
from lorahub.bases.index import BaseIndex, natural
from lorahub.engine.planning.plan import Plan
from lorahub.errors import BaseMismatch, Degraded, Incompatible, IntegrityError, LorahubError
from lorahub.findings import Axis, Finding, Verdict, worst
from lorahub.records import BaseRecord

__all__ = ["Kin", "base_findings", "findings", "library_findings", "part_findings", "refuse"]


class Kin(Protocol):
    """What is asked of a base whose weights are not the recorded ones, and only then."""

    def relatives(self) -> Mapping[str, str]:
        """The repositories that it says it was made from -> how."""

    def agrees(self, recorded: BaseRecord, names: Collection[str]) -> bool:
        """Whether the files that hold these parameters are known to be those of the recorded base, byte for byte."""


def base_findings(
    header: AdapterHeader,
    index: BaseIndex,
    touched: Collection[str],
    *,
    reads: Collection[str] = (),
    kin: Kin | None = None,
) -> list[Finding]:
    """What the adapter's record says of its base, held against ``index``.

    Args:
        header: the adapter, with its record if it has one.
        index: the base at hand.
        touched: canonical names of the parameters the adapter changes.
        reads: canonical names of others that its changes look at.
        kin: the base at hand, for what is asked where its weights differ.
    """
    recorded = header.record.base if header.record else None
    if recorded is None or not (recorded.weights_digest or recorded.structure or recorded.revision):
        claimed = header.reading.base_repo
        commit = header.reading.base_revision
        lacks = f" at {commit}, without a digest" if commit else ", without a commit or digest"
        says = f"its files name {claimed}{lacks}" if claimed else "its files do not name one"
        return [
            Finding(
                code="base-unrecorded",
                axis="base",
                level=Verdict.UNVERIFIED,
                message=f"nobody recorded which base the adapter was made for: {says}",
                remedy="lorahub record FOLDER --base BASE   (with the base it was trained on)",
            )
        ]
    return _weights(header, recorded, index, {*touched, *reads}, kin) + _structure(recorded, index, touched)


def _weights(
    header: AdapterHeader, recorded: BaseRecord, index: BaseIndex, needed: Collection[str], kin: Kin | None
) -> list[Finding]:
    same_commit = bool(recorded.revision) and (recorded.repo_id, recorded.revision) == (
        index.ref.repo,
        index.ref.commit,
    )
    here = index.weights
    if recorded.weights_digest and here == recorded.weights_digest:
        if recorded.repo_id and index.ref.repo and recorded.repo_id != index.ref.repo:
            return [
                Finding(
                    code="base-repo-differs-weights-equal",
                    axis="base",
                    level=Verdict.EXACT,
                    message=f"recorded for {_place(recorded)}, given {index.ref}: another repository, the same weights",
                )
            ]
        if recorded.revision and index.ref.commit and recorded.revision != index.ref.commit:
            return [
                Finding(
                    code="base-commit-differs-weights-equal",
                    axis="base",
                    level=Verdict.EXACT,
                    message=f"recorded for {_place(recorded)}, given {index.ref}: another commit, the same weights",
                )
            ]
        return [Finding(code="base-weights-equal", axis="base", level=Verdict.EXACT, message="the recorded weights")]
    if same_commit:
        return [
            Finding(
                code="base-commit-equal",
                axis="base",
                level=Verdict.EXACT,
                message=f"the recorded commit of {index.ref.repo}",
            )
        ]
    if not recorded.weights_digest:
        return [
            Finding(
                code="base-weights-unrecorded",
                axis="base",
                level=Verdict.UNVERIFIED,
                message=f"the record names {_place(recorded)} but no digest of its weights"
                if recorded.repo_id
                else "the record says what the base is built like, and neither its name nor a digest of its weights",
                remedy="lorahub record FOLDER --base BASE   (with the base it was trained on)",
            )
        ]
    if not here:
        why = "its hub lists no sha256 of them" if index.ref.repo else "it is a live model"
        return [
            Finding(
                code="base-weights-unknown",
                axis="base",
                level=Verdict.UNVERIFIED,
                message=f"the base's weights cannot be held against the recorded digest: {why}",
            )
        ]
    if _declared(header, index):
        return [
            Finding(
                code="base-declared-compatible",
                axis="base",
                level=Verdict.COMPATIBLE,
                message=f"{index.ref} is not the recorded base, but the adapter declares it compatible",
            )
        ]
    if kin is not None and kin.agrees(recorded, needed):
        return [
            Finding(
                code="base-untouched-weights-differ",
                axis="base",
                level=Verdict.COMPATIBLE,
                message=f"{index.ref} differs from {_place(recorded)} only in files that hold nothing the adapter "
                "touches",
            )
        ]
    how = kin.relatives().get(recorded.repo_id or "") if kin is not None else None
    if how is not None:
        return [
            Finding(
                code="base-declared-relative",
                axis="base",
                level=Verdict.UNVERIFIED,
                message=f"{index.ref} has other weights than {_place(recorded)}, which the adapter was made for, and "
                f"its card says that it was made from that ({how})",
                remedy="what the adapter does there nobody recorded: try it, or use the recorded base",
            )
        ]
    return [
        Finding(
            code="base-weights-differ",
            axis="base",
            level=Verdict.DEGRADED,
            message=f"made for {_place(recorded)} (weights {_short(recorded.weights_digest)}), "
            f"given {index.ref} (weights {_short(here)})",
            remedy="use the recorded base, or accept another with --allow base-weights-differ",
            allowable=True,
        )
    ]


def _structure(recorded: BaseRecord, index: BaseIndex, touched: Collection[str]) -> list[Finding]:
    if recorded.targets and recorded.targets != index.targets(touched):
        return [
            Finding(
                code="targets-differ",
                axis="base",
                level=Verdict.UNVERIFIED,
                message=f"the touched parameters have other names or shapes than recorded ({_short(recorded.targets)})",
            )
        ]
    if recorded.structure and recorded.structure != index.structure:
        return [
            Finding(
                code="structure-differs",
                axis="base",
                level=Verdict.EXACT,
                message="parameters that the adapter does not touch differ from the recorded base",
            )
        ]
    return []


def _declared(header: AdapterHeader, index: BaseIndex) -> bool:
    """Whether the record's ``compat.bases`` lists this base by weights digest, ``repo@commit`` or repository."""
    bases = header.record.compat.bases if header.record and header.record.compat else ()
    names = {index.weights, index.ref.repo, f"{index.ref.repo}@{index.ref.commit}"} - {"", "@"}
    return not names.isdisjoint(bases)


def _place(recorded: BaseRecord) -> str:
    commit = f"@{recorded.revision[:12]}" if recorded.revision else ""
    return f"{recorded.repo_id or 'a base without a name'}{commit}"


def _short(digest: str | None) -> str:
    return f"{(digest or '').removeprefix('sha256:')[:12]}..."


def part_findings(header: AdapterHeader) -> list[Finding]:
    """That an adapter which is no weight change at all cannot be merged, by its kind and with the reason.

    Nothing where its format has said so itself.
    """
    reading = header.reading
    if reading.groups or not reading.parts or any(each.code == "kind-unsupported" for each in header.findings):
        return []
    shown = ", ".join(f"{part.kind} ({name})" for name, part in [*reading.parts.items()][:3])
    return [
        Finding(
            code="kind-unsupported",
            axis="format",
            level=Verdict.INCOMPATIBLE,
            message=f"this is {shown}, which cannot be merged: {next(iter(reading.parts.values())).reason}",
            where=tuple(ref.key for part in reading.parts.values() for ref in part.tensors.values()),
            remedy="load it beside the model it is for",
        )
    ]


def library_findings(header: AdapterHeader, installed: Mapping[str, str] | None = None) -> list[Finding]:
    """The record's ``compat.requires`` against installed versions; libraries that are not installed are not judged."""
    requires = header.record.compat.requires if header.record and header.record.compat else {}
    found = []
    for library, text in sorted(requires.items()):
        version = _installed(library) if installed is None else installed.get(library)
        try:
            fits = version is None or SpecifierSet(text).contains(version, prereleases=True)
        except InvalidSpecifier:
            fits, version = False, f"{version} (and {text!r} is no version range)"
        if not fits:
            found.append(
                Finding(
                    code="library-out-of-range",
                    axis="libraries",
                    level=Verdict.DEGRADED,
                    message=f"the adapter asks for {library}{text}, installed is {version}",
                    remedy=f"pip install '{_requirement(library, text)}'",
                    allowable=True,
                )
            )
    return found


def _installed(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def _requirement(library: str, text: str) -> str:
    try:
        return str(Requirement(f"{library}{text}"))
    except InvalidRequirement:
        return library


def findings(
    header: AdapterHeader, index: BaseIndex, framework: Framework, plan: Plan, *, kin: Kin | None = None
) -> tuple[Finding, ...]:
    """Everything there is to say about merging ``header`` into the base behind ``index`` by ``plan``.

    Args:
        header: the adapter, read against the base.
        index: the base.
        framework: what loads it.
        plan: how the adapter lands there.
        kin: the base, for what is asked where its weights are not the recorded ones.
    """
    touched = {step.source for step in plan.steps if step.source}
    declared = [] if index.declared else [_undeclared(index, framework)]
    about_base = base_findings(header, index, touched, reads=plan.reads, kin=kin)
    own = [*header.findings, *about_base, *library_findings(header), *declared]
    own += [*part_findings(header), *_quantised(header, index, touched), *_components(index, plan)]
    return tuple(dict.fromkeys([*own, *plan.findings]))


def _components(index: BaseIndex, plan: Plan) -> list[Finding]:
    """What of an adapter lands where in a pipeline."""
    counts: dict[str, int] = {}
    for target in {term.target for step in plan.steps for term in step.terms}:
        counts[target.component] = counts.get(target.component, 0) + 1
    if not any(info.component for info in index.parameters.values()) or not counts:
        return []
    parts = sorted(counts)
    said = " and ".join(f"{counts[part]} targets in {part}" for part in parts)
    return [
        Finding(
            code="components", axis="placement", level=Verdict.EXACT, message=f"lands on {said}", where=tuple(parts)
        )
    ]


def _quantised(header: AdapterHeader, index: BaseIndex, touched: Collection[str]) -> list[Finding]:
    """What there is to say where one of two is quantised: the base at hand, or the one in training."""
    recorded = header.record.base.quantization if header.record and header.record.base else {}
    names = [name for name in touched if name in index.parameters and index.parameters[name].storage]
    if names:
        stored = " and ".join(sorted({index.parameters[name].storage for name in names}))
        return [
            Finding(
                code="base-quantised",
                axis="base",
                level=Verdict.UNVERIFIED,
                message=f"{len(names)} of the parameters that it changes are stored as {stored}: attached live it adds "
                "to what they compute, and a merge rounds to that grid again",
                where=tuple(sorted(names, key=natural)),
            )
        ]
    if recorded:
        how = ", ".join(f"{key} {value}" for key, value in recorded.items())
        return [
            Finding(
                code="trained-quantised",
                axis="base",
                level=Verdict.UNVERIFIED,
                message=f"it was trained on the base in quantised form ({how}), and the one at hand is not quantised: "
                "what training made up for in the rounding is then added to weights that were not rounded",
            )
        ]
    return []


def _undeclared(index: BaseIndex, framework: Framework) -> Finding:
    return Finding(
        code="base-undeclared",
        axis="libraries",
        level=Verdict.UNVERIFIED,
        message=f"no plugin knows this architecture; {framework.name} takes {index.ref} by names and shapes alone",
        remedy="lorahub plugins",
    )


def refuse(found: Collection[Finding], *, allowed: Collection[str] = (), subject: str) -> None:
    """Raise what the findings demand: nothing up to unverified, a typed error with all of them beyond.

    Args:
        found: all findings.
        allowed: codes given by ``--allow``.
        subject: what was asked, for the message ("acme/ink into acme/base").

    Raises:
        IntegrityError: an incompatible finding on the integrity axis.
        BaseMismatch: an incompatible finding on the placement or base axis.
        Incompatible: any other incompatible finding.
        Degraded: only degraded ones; the hint says how to allow each.
    """
    verdict = worst(found, allowed=allowed)
    if verdict < Verdict.DEGRADED:
        return
    stopping = tuple(each for each in found if worst([each], allowed=allowed) >= Verdict.DEGRADED)
    if verdict is Verdict.DEGRADED:
        codes = sorted({each.code for each in stopping})
        raise Degraded(
            f"{subject}: refused, because it would not give what the adapter's author meant",
            f"to go on all the same: {' '.join(f'--allow {code}' for code in codes)}",
            stopping,
        )
    axes = {each.axis for each in stopping if each.level is Verdict.INCOMPATIBLE}
    kind: type[LorahubError] = next(
        (error for axis, error in _ERRORS.items() if axis in axes),
        Incompatible,
    )
    raise kind(f"{subject}: cannot be done", "", stopping)


_ERRORS: dict[Axis, type[LorahubError]] = {
    "integrity": IntegrityError,
    "placement": BaseMismatch,
    "base": BaseMismatch,
}
