"""Do these adapters go together: one base, names in common, nothing that has no sum?  From headers alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from lorahub.adapter import AdapterHeader
from lorahub.findings import Finding, Verdict
from lorahub.records import BaseRecord

__all__ = ["differ", "together"]


def together(headers: Sequence[AdapterHeader]) -> tuple[Finding, ...]:
    """What there is to say of several adapters as one; ``bases-differ`` and ``nothing-shared`` stop until allowed."""
    return (*_bases(headers), *_names(headers), *_parts(headers))


def _base(header: AdapterHeader) -> BaseRecord:
    """What an adapter says of its base; an empty record where it says nothing."""
    recorded = header.record.base if header.record else None
    if recorded and (recorded.repo_id or recorded.weights_digest):
        return recorded
    return BaseRecord.model_construct(repo_id=header.reading.base_repo or None)


def _bases(headers: Sequence[AdapterHeader]) -> list[Finding]:
    silent = [header.label for header in headers if not (_base(header).repo_id or _base(header).weights_digest)]
    found = []
    if silent and len(headers) > 1:
        found.append(
            Finding(
                code="base-unrecorded",
                axis="base",
                level=Verdict.UNVERIFIED,
                message="nothing says which base these were made for, so nothing says that it is that of the others",
                where=tuple(silent),
                remedy="lorahub record FOLDER --base BASE",
            )
        )
    apart = [(one, other) for one, other in combinations(headers, 2) if differ(_base(one), _base(other))]
    if apart:
        found.append(
            Finding(
                code="bases-differ",
                axis="base",
                level=Verdict.DEGRADED,
                message="the adapters were made for different bases: "
                + "; ".join(
                    f"{one.label} for {_shown(_base(one))}, {other.label} for {_shown(_base(other))}"
                    for one, other in apart[:3]
                ),
                where=tuple(dict.fromkeys(header.label for pair in apart for header in pair)),
                remedy="compose adapters of one base, or accept a result that is right for neither: "
                "--allow bases-differ",
                allowable=True,
            )
        )
    return found


def differ(one: BaseRecord, other: BaseRecord) -> bool:
    """Whether both say what their base is, and it is not the same; equal weights are one base under any name."""
    if one.weights_digest and other.weights_digest:
        return one.weights_digest != other.weights_digest
    return bool(one.repo_id and other.repo_id and one.repo_id != other.repo_id)


def _shown(base: BaseRecord) -> str:
    revision = f"@{base.revision[:12]}" if base.revision else ""
    digest = f" ({base.weights_digest[:19]})" if base.weights_digest else ""
    return f"{base.repo_id or 'an unnamed base'}{revision}{digest}"


def _names(headers: Sequence[AdapterHeader]) -> list[Finding]:
    """Adapters, or parts of a pipeline in them, that most likely name the same modules differently."""
    apart = [(one, other, why) for one, other in combinations(headers, 2) if (why := _otherwise(one, other))]
    if not apart:
        return []
    return [
        Finding(
            code="nothing-shared",
            axis="placement",
            level=Verdict.DEGRADED,
            message="; ".join(
                f"{one.label} and {other.label} most likely name the same modules differently: {why}"
                for one, other, why in apart[:3]
            ),
            where=tuple(dict.fromkeys(header.label for one, other, _ in apart for header in (one, other))),
            remedy="name their base, whose names count then (--base BASE), or write one like the other: "
            "lorahub convert SOURCE --to FORMAT --component NAME; or accept: --allow nothing-shared",
            allowable=True,
        )
    ]


def _otherwise(one: AdapterHeader, other: AdapterHeader) -> str:
    """Why two adapters without a common target, in all or in a part, may well be for the same modules, or ""."""
    if not one.touches.keys() & other.touches.keys():
        modules = [{(target.module, target.parameter) for target in header.touches} for header in (one, other)]
        if modules[0] & modules[1]:
            parts = [sorted({target.component for target in header.touches}) for header in (one, other)]
            said = [", ".join(each or "none" for each in found) for found in parts]
            return f"the components are {said[0]} and {said[1]}"
        if one.format != other.format:
            return f"one is in {one.format} files and one in {other.format} files, and nothing is in both"
    first, second = (_by_component(header) for header in (one, other))
    for component in sorted(first.keys() & second.keys()):
        if not first[component] & second[component] and (pair := _nested(first[component], second[component])):
            return f"{f'in {component}, ' if component else ''}{pair[0]} and {pair[1]}"
    return ""


def _by_component(header: AdapterHeader) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for target in header.touches:
        found.setdefault(target.component, set()).add(f"{target.module}.{target.parameter}")
    return found


def _nested(one: set[str], other: set[str]) -> tuple[str, str] | None:
    """Two names of which one is the end of the other, as where a library put its modules one level deeper."""
    for shorter, longer, turned in ((one, other, False), (other, one, True)):
        for name in sorted(longer):
            place = name.find(".")
            while place >= 0:
                if (end := name[place + 1 :]) in shorter and end.count(".") > 1:
                    return (name, end) if turned else (end, name)
                place = name.find(".", place + 1)
    return None


def _parts(headers: Sequence[AdapterHeader]) -> list[Finding]:
    found = [
        f"{header.label}: {name} ({part.kind})" for header in headers for name, part in header.reading.parts.items()
    ]
    if not found:
        return []
    return [
        Finding(
            code="parts-left-out",
            axis="format",
            level=Verdict.DEGRADED,
            message="what is no weight change has no sum, and is not in the result",
            where=tuple(found),
            remedy="leave it out knowingly: --allow parts-left-out",
            allowable=True,
        )
    ]
