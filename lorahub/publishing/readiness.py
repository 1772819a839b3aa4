"""Whether an adapter folder can be published, and as what: its record completed, its card made, every fault at once.

Asks no hub, save for the headers of a base that is named with ``--base``.  Writes nothing.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

from lorahub import cards
from lorahub.adapter import RECORD_FINDINGS, AdapterHeader, open_header
from lorahub.errors import LorahubError, PushRefused, RecordError, UsageError
from lorahub.fetching import Progress, Source
from lorahub.files.finite import not_finite
from lorahub.findings import Finding, Verdict
from lorahub.front_matter import front_matter
from lorahub.hub.contents import survey
from lorahub.hub.selection import adapter_folders
from lorahub.names import Ref, as_version, printable
from lorahub.plugins import load_registry
from lorahub.publishing.known_base import named_base
from lorahub.publishing.recorded import drafted
from lorahub.records import FILENAME, SCHEMA_VERSION, AdapterRecord

__all__ = ["Ready", "ready"]

_OPTIONS = {"version": "--version 1.0.0", "license": "--license apache-2.0", "base.repo_id": "--base NS/NAME"}
_BASELESS = frozenset({"base-is-a-local-path", "base-unknown"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A folder as it is to be published.

    Attributes:
        record: its record, complete.
        given: file -> content that the folder does not hold, or not so: the record, the card and its picture.
        skipped: what stays behind.
        files: every file that goes, but for ``given``.
        header: the adapter as it lies there.
        readme: the folder's README, or None.
        said: what there is to say of it all the same.
    """

    record: AdapterRecord
    header: AdapterHeader
    readme: str | None
    files: tuple[str, ...]
    given: Mapping[str, bytes]
    skipped: tuple[str, ...]
    said: tuple[Finding, ...] = ()


@dataclass(slots=True)
class _Faults:
    """What keeps a folder from being published, collected."""

    found: list[Finding] = field(default_factory=list)
    options: list[str] = field(default_factory=list)

    def add(self, code: str, message: str, remedy: str, where: tuple[str, ...] = (), *, option: str = "") -> None:
        """One more; ``option`` is what the command lacks, where that is all there is to it."""
        self.options += [option] * bool(option)
        self.found.append(
            Finding(code=code, axis="policy", level=Verdict.INCOMPATIBLE, message=message, where=where, remedy=remedy)
        )

    def demand(self, folder: Path) -> None:
        """Raise them, if there are any.

        Raises:
            PushRefused: with every one of them.
        """
        if self.found:
            hint = f"Add to the command: {' '.join(self.options)}" if len(self.options) > 1 else ""
            count = f"{len(self.found)} reasons" if len(self.found) > 1 else "a reason"
            raise PushRefused(f"{folder} cannot be published, for {count}; nothing was sent", hint, tuple(self.found))


def ready(
    folder: Path,
    to: Ref,
    *,
    version: str | None,
    base: Source | None,
    license_: str | None,
    card: bool,
    hub: str | None,
    progress: Progress,
) -> Ready:
    """The folder as it is to be published, or everything that keeps it from that.

    Args:
        folder: the adapter's.
        to: the repository.
        version: as "1.2.0"; None keeps the record's.
        base: what it was trained on; None keeps what is recorded, or what the adapter's own files name.
        license_: SPDX identifier; None keeps the record's, or the README's.
        card: whether README.md is made or brought up to date.
        hub: where a base lies that is named so.
        progress: called with (bytes done, bytes in all).

    Raises:
        PushRefused: it cannot be published; every reason is among the findings.
        BaseMismatch: the adapter does not fit the base that was named.
        UnsupportedFormat, IntegrityError: its files are no adapter, or malformed.
        UsageError: the version is none.
    """
    version = _plain(version)
    faults, surveyed = _Faults(), survey(folder)
    faults.found += surveyed.refused
    try:
        header = open_header(folder, load_registry())
    except LorahubError as error:
        if (inside := adapter_folders(surveyed.files)) and not faults.found:
            each = f"lorahub push {to}/{inside[0]} {shlex.quote(str(folder / inside[0]))}"
            raise PushRefused(
                f"{folder} is no adapter itself but holds {len(inside)}: {', '.join(map(printable, inside[:8]))}",
                f"Push each by itself: {each}",
            ) from None
        if not faults.found:
            raise
        faults.add("no-adapter", error.message, error.hint)
        faults.demand(folder)
        raise AssertionError from None  # not reached
    anew = f"lorahub record {shlex.quote(str(folder))}   (writes the record anew, where it was you who changed them)"
    faults.found += [replace(each, remedy=anew) for each in header.findings if each.code in RECORD_FINDINGS]
    _test_numbers(header, faults)
    readme = _readme(folder, faults)
    record = _record(header, readme, faults, to=to, base=base, hub=hub, progress=progress)
    record = _completed(record, readme, to, version=version, license_=license_)
    _test_complete(record, folder, to, faults, based=base is not None)
    faults.demand(folder)
    given = {FILENAME: record.to_json().encode()}
    said: tuple[Finding, ...] = ()
    if card:
        made = _card(readme, header, record, to, faults)
        if made is not None:
            given |= {cards.FILE: made.text.encode(), **made.pictures}
            faults.found += [each for each in made.findings if each.level >= Verdict.DEGRADED]
            said = tuple(each for each in made.findings if each.level < Verdict.DEGRADED)
    faults.demand(folder)
    return Ready(
        record=record,
        header=header,
        readme=readme,
        files=tuple(surveyed.files),
        given=MappingProxyType(given),
        skipped=surveyed.skipped,
        said=said,
    )


def _plain(version: str | None) -> str | None:
    """A version as records spell it: "v1.0.0" is 1.0.0."""
    if version is None:
        return None
    parsed = as_version(version)
    if parsed is None or parsed.local or parsed.epoch:
        raise UsageError(
            f"'{printable(version)}' is not a version that can be published", "Versions look like 1.2.0 or 2.0rc1."
        )
    return str(parsed)


def _readme(folder: Path, faults: _Faults) -> str | None:
    try:
        return cards.read_card(folder)
    except RecordError as error:
        faults.add("readme-unreadable", error.message, error.hint)
        return None


def _test_numbers(header: AdapterHeader, faults: _Faults) -> None:
    wrong = [
        f"{file}: {printable(name)}"
        for file, head in header.files.headers.items()
        for name in not_finite(header.folder / file, head)
    ]
    if wrong:
        faults.add(
            "not-finite",
            "weights that are NaN or infinite, which spoil every model they are put into",
            "Publish an earlier checkpoint; a lower learning rate or bfloat16 in training may help.",
            tuple(wrong),
        )


def _record(
    header: AdapterHeader,
    readme: str | None,
    faults: _Faults,
    *,
    to: Ref,
    base: Source | None,
    hub: str | None,
    progress: Progress,
) -> AdapterRecord:
    """The record as it is, or as one is made now; a sketch of one where the folder is refused already."""
    folder, sound = header.folder, not faults.found
    if base is not None and sound:
        return drafted(folder, base, hub=hub, progress=progress)
    earlier = header.record
    if base is None and (earlier is None or earlier.base is None):
        known = named_base(header, readme or "")
        if known.base is None:
            _no_base(known.local, known.where, folder, to, faults)
        if sound:
            return drafted(folder, named=known.base)
        earlier = (earlier or _SKETCH).changed(base=known.base)
    return earlier or _SKETCH


_SKETCH = AdapterRecord(schema_version=SCHEMA_VERSION, kinds=("unknown",))


def _no_base(local: str, where: str, folder: Path, to: Ref, faults: _Faults) -> None:
    place = shlex.quote(str(folder))
    again = f"lorahub push {to} {place} --base NS/NAME"
    if local:
        faults.add(
            "base-is-a-local-path",
            f"{where} names the base as '{local}', a place on this machine that nobody else has",
            f"Say what it is called on the Hub: {again}; for one that is in no repository: "
            f"lorahub record {place} --base {shlex.quote(local)}",
            option="--base NS/NAME",
        )
        return
    faults.add(
        "base-unknown",
        "nothing says which base the adapter was made for, so nobody could check it against one",
        f"{again}; for one that cannot be had from here, base_model: NS/NAME between two lines of --- in "
        f"{folder / cards.FILE}; for one that is in no repository: lorahub record {place} --base FOLDER",
        option="--base NS/NAME",
    )


def _completed(
    record: AdapterRecord, readme: str | None, to: Ref, *, version: str | None, license_: str | None
) -> AdapterRecord:
    """The record with the version, and with the name and licence where it has none."""
    card = front_matter(readme or "")
    fields: dict[str, object] = {
        "version": version or record.version,
        "name": record.name or _name(to),
        "license": license_ or record.license or _text(card.get("license")),
    }
    if not record.license_link and not license_:
        fields["license_link"] = _text(card.get("license_link"))
    return record.changed(**{key: value for key, value in fields.items() if value})


def _name(to: Ref) -> str:
    return to.subpath.rpartition("/")[2] or (to.repo or "").rpartition("/")[2]


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _test_complete(record: AdapterRecord, folder: Path, to: Ref, faults: _Faults, *, based: bool) -> None:
    place = shlex.quote(str(folder))
    push = f"lorahub push {to} {place}"
    reasons = {
        "version": ("no version was given, and the record has none", f"{push} --version 1.0.0"),
        "license": (
            "nothing says under which licence it may be used",
            f"{push} --license apache-2.0   (or another: huggingface.co/docs/hub/repositories-licenses)",
        ),
        "base.repo_id": ("the record does not say what its base is called", f"{push} --base NS/NAME"),
        "files": ("the record lists no files", f"lorahub record {place}"),
        "name": ("the record has no name", f"lorahub record {place} --name NAME"),
    }
    told = {"files"} if faults.found else set()  # a folder that is refused is not hashed
    told |= {"base.repo_id"} if (based and faults.found) or {each.code for each in faults.found} & _BASELESS else set()
    for key in record.missing_for_push():
        if key in told:
            continue
        code = f"{key.replace('.', '-').replace('_', '-')}-missing"
        faults.add(code, *reasons[key], option=_OPTIONS.get(key, ""))


def _card(
    readme: str | None, header: AdapterHeader, record: AdapterRecord, to: Ref, faults: _Faults
) -> cards.Card | None:
    try:
        return cards.make_card(readme, header, record, repo=to.repo or "", subfolder=to.subpath)
    except RecordError as error:
        faults.add("card-unclear", error.message, f"{error.hint}; or leave README.md alone: --no-card".lstrip("; "))
        return None
