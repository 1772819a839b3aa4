"""The waist: an adapter as a value, from a folder and back to one, with every key accounted for.

A header is what files say without their weights; an adapter is a header with its deltas.  Formats spell, kinds
compute; here both are brought together, all or nothing.  Knows no spelling and no base beyond its names.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

from lorahub.bases.index import BaseIndex
from lorahub.bases.layers import ranges_of, shown
from lorahub.bases.layout import Target
from lorahub.combination import Combinable
from lorahub.deltas.delta import Delta
from lorahub.deltas.disputes import REFUSED, UNDECIDED, Compat
from lorahub.deltas.kind import JSON, Touch
from lorahub.errors import (
    BaseNeeded,
    CannotCarry,
    Incompatible,
    IntegrityError,
    NotFinite,
    RecordError,
    UnsupportedFormat,
    UnsupportedKind,
)
from lorahub.files.tensors import FileSource
from lorahub.findings import Claim, Finding, Verdict
from lorahub.formats.assembly import account, build_deltas, each_touch, ill_typed, touches
from lorahub.formats.families import representatives
from lorahub.formats.format import AdapterFiles, Format, Part, Reading
from lorahub.formats.on_demand import OnDemand
from lorahub.formats.survey import RECENT, Seen, explain, header_fault, survey
from lorahub.lazy import torch
from lorahub.plugins import load_registry
from lorahub.records import FILENAME, AdapterRecord
from lorahub.registry import Registry
from lorahub.saving import write_folder

__all__ = [
    "RECORD_FINDINGS",
    "Adapter",
    "AdapterHeader",
    "OpenAdapter",
    "judge_record",
    "load",
    "open_deltas",
    "open_header",
    "recognise",
    "save",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterHeader:
    """What an adapter's files say, without its weights.

    Attributes:
        label: what people call it.
        folder: where it lies.
        files: headers and configs found there.
        reading: what its format made of them; under the base's names where ``index`` is given.
        touches: every parameter it changes.
        record: its metadata record, or None; without its maths fields where files changed since.
        findings: everything there is to say before a base is looked at.
        index: the base whose names were used, or None.
        claim: how sure its format was, and why.
    """

    label: str
    folder: Path
    files: AdapterFiles
    reading: Reading
    touches: Mapping[Target, Touch]
    record: AdapterRecord | None
    findings: tuple[Finding, ...]
    index: BaseIndex | None = None
    claim: Claim | None = None

    @property
    def format(self) -> str:
        """The registered name of its format."""
        return self.reading.format

    @property
    def kinds(self) -> tuple[str, ...]:
        """Every kind it uses, sorted."""
        return tuple(
            sorted(
                {group.kind for group in representatives(self.reading.groups)}
                | {kind for kind, _ in self.reading.shared}
            )
        )

    @property
    def ranks(self) -> tuple[int, ...]:
        """Every rank it uses, ascending."""
        return tuple(sorted({touch.rank for touch in each_touch(self.touches) if touch.rank is not None}))


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter(Combinable):
    """A metadata record, and what happens to each target.

    Attributes:
        deltas: target -> change; logical orientation, dtypes as stored.
        record: its metadata, or None.
        parts: what is no weight change, by name.
        hints: what its format said that no delta holds, and that writing wants back: ``roles`` (target name -> role of
            the module), ``base_repo`` and ``base_revision``, ``transposed`` (target names whose base stores [in, out];
            replacements are [out, in] here), ``base_config`` (of the base whose names are used), and what is the
            format's own.
        header: the files it came from, or None for one made in memory.
    """

    deltas: Mapping[Target, Delta]
    record: AdapterRecord | None = None
    parts: Mapping[str, Part] = field(default_factory=lambda: MappingProxyType({}))
    hints: Mapping[str, JSON] = field(default_factory=lambda: MappingProxyType({}))
    header: AdapterHeader | None = None


def open_header(
    path: str | os.PathLike[str],
    registry: Registry,
    *,
    index: BaseIndex | None = None,
    weight_name: str = "",
    subfolder: str = "",
    label: str = "",
    seen: Seen | None = None,
    compat: Compat | None = None,
) -> AdapterHeader:
    """Recognise an adapter and account for every tensor in it; headers only, no torch.

    Args:
        path: its folder, or its weights file.
        registry: kinds and formats.
        index: the base, to find its names among the keys.
        weight_name: the file meant, where the folder holds several.
        subfolder: a folder inside ``path``.
        label: what people call it; the folder's name by default.
        seen: see ``survey``.
        compat: whose result counts where PEFT's is not the declared one, "peft" or "strict"; None takes what the file
            itself or the record says, and where that is nothing, a finding asks.

    Raises:
        NotFound: nothing is there.
        UnsupportedFormat: no format claims the files, or two alike; the message says what was found instead.
        UnsupportedKind: it is recognised, and is no weight change at all.
        HeaderError, IntegrityError: the files are malformed.
    """
    files = survey(path, weight_name=weight_name, subfolder=subfolder, seen=seen)
    files = replace(files, compat=compat) if compat else files
    record, about_record = _record(files.folder)
    return recognise(files, registry, index=index, label=label, record=record, said=about_record)


def recognise(
    files: AdapterFiles,
    registry: Registry,
    *,
    index: BaseIndex | None = None,
    label: str = "",
    record: AdapterRecord | None = None,
    said: Sequence[Finding] = (),
) -> AdapterHeader:
    """As ``open_header``, of files that were surveyed already; they need not lie on this machine.

    Args:
        files: headers and configs.
        registry: kinds and formats.
        index: the base, to find its names among the keys.
        label: what people call it; the folder's name by default.
        record: what is recorded of it.
        said: what there is to say of the record.

    Raises:
        UnsupportedFormat, UnsupportedKind, IntegrityError: as ``open_header``.
    """
    if files.headers and all(header_fault(header) for header in files.headers.values()):
        raise explain(files)
    claim, reader = _choose(files, registry)
    reading = reader.read(files, tuple(registry.kinds.values()), index)
    recorded = record.compat.choice if record and record.compat else None
    fresh = not any(each.code == _STALE for each in said)
    if recorded and fresh and any(each.code == UNDECIDED for each in reading.findings):
        files = replace(files, compat=recorded)
        reading = reader.read(files, tuple(registry.kinds.values()), index)
    header = files.headers[reading.file]
    if fault := header_fault(header):
        raise UnsupportedFormat(f"{files.folder / reading.file} {fault}", "fetch it again, or ask its author")
    account(reading, header)
    changed, twice = touches(reading.groups, registry.kinds)
    return AdapterHeader(
        label=label or files.folder.name,
        folder=files.folder,
        files=files,
        reading=reading,
        touches=changed,
        record=record,
        findings=(*reading.findings, *ill_typed(reading, registry.kinds), *twice, *said),
        index=index,
        claim=claim,
    )


def _choose(files: AdapterFiles, registry: Registry) -> tuple[Claim, Format]:
    """The format with the strongest claim."""
    claims = [(claim, each) for each in registry.formats.values() if (claim := each.claims(files))]
    if not claims:
        raise explain(files)
    best = max(claim.score for claim, _ in claims)
    leading = [(claim, each) for claim, each in claims if claim.score == best]
    if len(leading) > 1:
        rivals = " and ".join(f"{each.name} ({claim.reason})" for claim, each in leading)
        raise UnsupportedFormat(f"{files.folder} could be of several formats: {rivals}")
    return leading[0]


_INVALID, _STALE = "record-invalid", "record-stale"
RECORD_FINDINGS = frozenset({_INVALID, _STALE})
"""Codes of what there is to say of a record."""

_RECORD_ANEW = "lorahub record FOLDER   (writes the record anew)"


def _record(folder: Path) -> tuple[AdapterRecord | None, list[Finding]]:
    """The record in a folder, and what is wrong with it."""
    path = folder / FILENAME
    if not path.is_file():
        return None, []
    return judge_record(lambda: AdapterRecord.load(path), lambda record: record.stale(folder))


def judge_record(
    read: Callable[[], AdapterRecord], stale_files: Callable[[AdapterRecord], tuple[str, ...]]
) -> tuple[AdapterRecord | None, list[Finding]]:
    """A record as far as it may be used, and what is wrong with it.

    Args:
        read: gives the record, or raises ``RecordError``.
        stale_files: those of its files that are missing or have other content now.
    """
    try:
        record = read()
    except RecordError as error:
        finding = Finding(
            code=_INVALID,
            axis="integrity",
            level=Verdict.DEGRADED,
            message=error.message,
            where=(FILENAME,),
            remedy=_RECORD_ANEW,
            allowable=True,
        )
        return None, [finding]
    stale = stale_files(record)
    if not stale:
        return record, []
    changed = "1 file is not the one" if len(stale) == 1 else f"{len(stale)} files are not those"
    finding = Finding(
        code=_STALE,
        axis="integrity",
        level=Verdict.DEGRADED,
        message=f"{changed} that {FILENAME} was written for; its arithmetic is ignored",
        where=stale,
        remedy=f"fetch the adapter again, or, if you changed it yourself: {_RECORD_ANEW}",
        allowable=True,
    )
    return record.changed(modules=None, components=None), [finding]


def load(
    header: AdapterHeader, registry: Registry, *, index: BaseIndex | None = None, allow_nonfinite: bool = False
) -> Adapter:
    """Read the tensors and build every delta, or none.

    Args:
        header: what to read.
        registry: kinds and formats.
        index: the base, to use its names and storage; the header's own by default.
        allow_nonfinite: take NaN and infinity as they are.

    Raises:
        IntegrityError: the files contradict themselves; ``findings`` lists how.
        UnsupportedKind: no kind reads it, or it is for a model that repeats layers of its base, and ``index`` is not
            that model's.
        BaseNeeded: its files leave out what follows from the base.
        Incompatible: whose result counts has to be chosen first, or which parameter is meant cannot be told.
        NotFinite: naming the tensors with NaN or infinity.
        MissingDependency: torch is not installed.
    """
    reading, index = _readable(header, registry, index)
    with FileSource(header.folder / reading.file, known=RECENT) as source:
        tensors = source.read_all(dict.fromkeys(_keys(reading)))
    if not allow_nonfinite:
        _demand_finite(header.label, tensors)
    deltas, transposed = build_deltas(reading, tensors.__getitem__, registry.kinds, index)
    about: dict[str, JSON] = {
        "base_repo": reading.base_repo,
        "base_revision": reading.base_revision,
        "transposed": transposed,
        "base_config": dict(index.config) if index else None,
    }
    hints = {**reading.hints, **{name: value for name, value in about.items() if value}}
    return Adapter(
        deltas=MappingProxyType(deltas),
        record=header.record,
        parts=reading.parts,
        hints=MappingProxyType(hints),
        header=header,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenAdapter:
    """An adapter whose deltas are read from its file when they are asked for, as long as that is open.

    Attributes:
        deltas: target -> change, the same as ``load`` gives.
        content: ``sha256:`` over the tensors.
    """

    deltas: Mapping[Target, Delta]
    content: str


@contextmanager
def open_deltas(
    header: AdapterHeader, registry: Registry, *, index: BaseIndex | None = None, kept: int | None = None
) -> Iterator[OpenAdapter]:
    """The deltas of an adapter without holding them all; the file is gone through once, and nothing is built yet.

    Args:
        header: what to read.
        registry: kinds and formats.
        index: the base, to use its names and storage; the header's own by default.
        kept: bytes of deltas to remember for the next time; 0 where each is asked for once.

    Raises:
        IntegrityError, UnsupportedKind, BaseNeeded, Incompatible, NotFinite, MissingDependency: as ``load``.
    """
    reading, index = _readable(header, registry, index)
    with FileSource(header.folder / reading.file) as source:
        deltas = OnDemand(reading, source, registry.kinds, index, header.label, kept=kept)
        yield OpenAdapter(deltas=deltas, content=deltas.content)


def _readable(header: AdapterHeader, registry: Registry, index: BaseIndex | None) -> tuple[Reading, BaseIndex | None]:
    """What a header's format makes of it for a base, where that is a value."""
    reading, index = header.reading, header.index if index is None else index
    if index is not header.index:
        reading = registry.formats[header.format].read(header.files, tuple(registry.kinds.values()), index)
    _refuse(
        header.label, (*reading.findings, *(each for each in header.findings if each not in header.reading.findings))
    )
    _demand_layers(header.label, reading, index)
    return reading, index


_UNREAD = frozenset({"config-missing", "config-refused", "kind-unsupported"})
"""Codes of findings under which the tensors are not, or not known to be, the changes that they look like."""

_UNSETTLED = frozenset({UNDECIDED, REFUSED, "parameter-ambiguous"})
"""Codes of findings under which nobody can say what a change is."""


def _refuse(label: str, findings: tuple[Finding, ...]) -> None:
    """Stop at what makes a value impossible; everything else is policy, decided where a base is known."""
    impossible = [each for each in findings if each.level is Verdict.INCOMPATIBLE]
    broken = tuple(each for each in impossible if each.axis == "integrity")
    unread = tuple(each for each in impossible if each.code in _UNREAD)
    unplaced = tuple(each for each in findings if each.code == "base-needed")
    unsettled = tuple(each for each in impossible if each.code in _UNSETTLED)
    if broken:
        raise IntegrityError(f"{label}: {broken[0].show()}", broken[0].remedy, broken)
    if unread:
        raise UnsupportedKind(f"{label}: {unread[0].message}", unread[0].remedy, unread)
    if unplaced:
        raise BaseNeeded(f"{label}: {unplaced[0].message}", unplaced[0].remedy, unplaced)
    if unsettled:
        raise Incompatible(f"{label}: {unsettled[0].message}", unsettled[0].remedy, unsettled)


def _demand_layers(label: str, reading: Reading, index: BaseIndex | None) -> None:
    """Refuse changes to layers that only a deeper model than the base has, outside of it."""
    asked = ranges_of(reading.hints)
    if asked and not (index and index.repeated and index.repeated.ranges == asked):
        raise UnsupportedKind(
            f"{label}: it is for a model that repeats layers of its base ({shown(asked)}), so without that model its "
            "changes are to layers that are not there",
            "merge it to disk: lorahub merge REF --base BASE --compat strict -o FOLDER",
        )


def _keys(reading: Reading) -> list[str]:
    return [ref.key for group in reading.groups for ref in group.slots.values()] + [
        ref.key for ref in reading.shared.values()
    ]


def _demand_finite(label: str, tensors: Mapping[str, torch.Tensor]) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for factors this small, threads cost more at their barrier than they save
    try:
        suspects = [key for alike in _sharing_memory(tensors) for key in alike]
        bad = [key for key in suspects if not _finite(tensors[key])]
    finally:
        torch.set_num_threads(threads)
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise NotFinite(
            f"{label}: NaN or infinity in {', '.join(bad[:3])}{more}", "its training diverged, or it is damaged"
        )


def _sharing_memory(tensors: Mapping[str, torch.Tensor]) -> Iterator[list[str]]:
    """Tensors by the memory that they lie in, but for memory that is all numbers of theirs, and all finite."""
    together: dict[int, list[str]] = {}
    for key, tensor in tensors.items():
        together.setdefault(tensor.untyped_storage().data_ptr(), []).append(key)
    for keys in together.values():
        first = tensors[keys[0]]
        memory = first.untyped_storage()
        if len(keys) > 1 and all(tensors[key].dtype == first.dtype for key in keys):
            count = memory.nbytes() // first.element_size()
            if _finite(first.as_strided((count,), (1,), 0)):
                continue
        yield keys


def _finite(tensor: torch.Tensor) -> bool:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    wide = tensor.float() if tensor.element_size() == 1 else tensor  # no sums and no isfinite for 8-bit floats
    total = wide.sum()  # NaN and infinity survive every sum; one that is too large for its dtype is looked into
    return bool(torch.isfinite(total) or torch.isfinite(wide).all())


def save(
    adapter: Adapter,
    folder: str | os.PathLike[str],
    *,
    registry: Registry | None = None,
    format: str = "peft",  # noqa: A002 - what people call it
) -> Path:
    """Write an adapter to ``folder``; what is there afterwards reads back as the same deltas, bit for bit.

    A new folder appears whole or not at all.  In a folder that exists, files are replaced one by one, each whole.

    Args:
        adapter: what to write.
        folder: where to.
        registry: kinds and formats; the installed ones by default.
        format: which layout.

    Raises:
        CannotCarry: the format has no word for part of it; nothing was written.
        WriteFailed: no space or no permission.
    """
    if adapter.parts:
        raise CannotCarry(
            f"the format '{format}' cannot carry what is no weight change: {', '.join(sorted(adapter.parts))}"
        )
    return write_folder(
        Path(folder),
        adapter.deltas,
        registry=load_registry() if registry is None else registry,
        format=format,
        hints=adapter.hints,
        record=adapter.record,
    )
