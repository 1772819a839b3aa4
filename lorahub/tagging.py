"""Metadata written into a safetensors file: the header changes, not one byte of the tensors, and so not AutoV3.

What an adapter computes must not depend on a tag: the file is read before and as it would be after, and a change that
would make another adapter of it is refused.  The file appears whole or not at all.  Keys follow ModelSpec 1.0.1
(github.com/Stability-AI/ModelSpec) and kohya's sd-scripts.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from lorahub.adapter import recognise
from lorahub.errors import IntegrityError, LorahubError, NotFound, RecordError, UnsupportedFormat, UsageError
from lorahub.files.atomic import atomic_write, flush, new_partial, put_in_place, write_failed
from lorahub.files.digest import file_digest
from lorahub.files.header import Header, header_of, parse_header, read_header
from lorahub.files.raw import copy_range, open_regular, read_into, write_at
from lorahub.files.writer import encode_header
from lorahub.formats.format import AdapterFiles
from lorahub.formats.survey import survey
from lorahub.hub.cache import pin_of
from lorahub.names import printable
from lorahub.plugins import load_registry
from lorahub.records import FILENAME, AdapterRecord, FileRecord

__all__ = ["SHORT", "Tagged", "metadata_of", "tag"]

SHORT: Mapping[str, str] = MappingProxyType(
    {
        "architecture": "modelspec.architecture",
        "author": "modelspec.author",
        "base": "ss_sd_model_name",
        "base_version": "ss_base_model_version",
        "comment": "ss_training_comment",
        "date": "modelspec.date",
        "description": "modelspec.description",
        "implementation": "modelspec.implementation",
        "license": "modelspec.license",
        "merged_from": "modelspec.merged_from",
        "prediction_type": "modelspec.prediction_type",
        "resolution": "modelspec.resolution",
        "tags": "modelspec.tags",
        "thumbnail": "modelspec.thumbnail",
        "title": "modelspec.title",
        "trigger_words": "modelspec.trigger_phrase",
        "usage_hint": "modelspec.usage_hint",
    }
)
"""Short key -> the key that is written, which other tools read."""

_SPEC, _SPEC_VERSION = "modelspec.sai_model_spec", "1.0.1"
_MUST = ("modelspec.architecture", "modelspec.implementation", "modelspec.title")
"""What ModelSpec demands of a file that uses it."""

_OWN: Mapping[str, str] = MappingProxyType(
    {
        "format": "loaders take their framework from it",
        "lorahub": "it holds the adapter's arithmetic, which lorahub writes itself",
        "lorahub.modules": "it holds the modules' names, which lorahub writes itself",
    }
)
"""Keys that are no tags -> why."""

_LONGEST = 200
_WIDEST = 8
"""Bytes of the widest single number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tagged:
    """What became of a file.

    Attributes:
        path: the file.
        metadata: all of its metadata now, sorted by key.
        changed: keys that were added or have another value now, or are gone, sorted.
        record: what became of ``lorahub.json`` beside it: "updated", "stale" (it was before, and stays so), or "".
        lacking: what ModelSpec demands of the file besides.
    """

    path: Path
    metadata: Mapping[str, str]
    changed: tuple[str, ...]
    record: str
    lacking: tuple[str, ...]

    def document(self) -> dict[str, object]:
        """JSON-ready values."""
        return {
            "path": str(self.path),
            "metadata": dict(self.metadata),
            "changed": list(self.changed),
            "record": self.record,
            "lacking": list(self.lacking),
        }


def metadata_of(path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata in a file's header, sorted by key.

    Raises:
        HeaderError, NotFound, AccessDenied: it cannot be read.
        UsageError: a folder with several weights files.
    """
    return dict(sorted(read_header(_file(path)).metadata.items()))


def tag(
    path: str | os.PathLike[str], changes: Mapping[str, str] = MappingProxyType({}), *, remove: Collection[str] = ()
) -> Tagged:
    """Write metadata into a safetensors file; where nothing changes, the file is left as it is.

    Args:
        path: the file, or a folder with a single one.
        changes: key -> value; keys of ``SHORT`` are written as what they stand for.
        remove: keys to take out, spelled the same way.

    Raises:
        UsageError: a key or value that may not be written, a key to remove that is not there, a link, or a folder that
            was pulled.
        IntegrityError: the file is malformed, or changed meanwhile.
        WriteFailed: no space or no permission; the file is as it was.
    """
    file = _file(path)
    _demand_ours(file)
    wanted = _wanted(changes)
    gone = {SHORT.get(key, key) for key in remove}
    old = read_header(file)
    if absent := sorted(gone - old.metadata.keys()):
        raise UsageError(f"{file} has no metadata called {', '.join(map(printable, absent))}", f"lorahub tag {file}")
    for key in [*wanted, *gone]:
        _demand_free(key)
    if any(key.startswith("modelspec.") for key in wanted) and _SPEC not in {*old.metadata, *wanted}:
        wanted[_SPEC] = _SPEC_VERSION
    metadata = {key: text for key, text in {**old.metadata, **wanted}.items() if key not in gone or key in wanted}
    changed = sorted(key for key in {*metadata, *old.metadata} if metadata.get(key) != old.metadata.get(key))
    beside = ""
    if changed:
        entries = {name: (info.dtype, info.shape) for name, info in old.tensors.items()}
        encoded = encode_header(entries, metadata)
        _demand_same(file, old, encoded)
        record = _record(file.parent)
        fresh = record is not None and _is_fresh(record, file)
        _write(file, old, encoded)
        if record is not None and file.name in record.files:
            beside = _update(record, file) if fresh else "stale"
    return Tagged(
        path=file,
        metadata=MappingProxyType(dict(sorted(metadata.items()))),
        changed=tuple(changed),
        record=beside,
        lacking=tuple(key for key in _MUST if _SPEC in metadata and key not in metadata),
    )


def _file(path: str | os.PathLike[str]) -> Path:
    """The weights file that is meant.

    Raises:
        NotFound, UsageError: there is none, several, or only one that is not ours to change.
    """
    place = Path(path)
    if place.is_dir():
        found = sorted(each.name for each in place.iterdir() if each.name.endswith(".safetensors"))
        if len(found) != 1:
            says = f"holds {len(found)} of them: {', '.join(found[:5])}" if found else "holds none"
            raise UsageError(f"a safetensors file is tagged, and {place} {says}", "name the file")
        place = place / found[0]
    if not place.exists():
        raise NotFound(f"there is no file {place}", "give a .safetensors file")
    return place


def _wanted(changes: Mapping[str, str]) -> dict[str, str]:
    wanted: dict[str, str] = {}
    for key, text in changes.items():
        spelled = SHORT.get(key, key)
        if wanted.get(spelled, text) != text:
            raise UsageError(f"{key} and {spelled} are one key, and two values are given for it", "give one of them")
        if fault := _value_fault(text):
            raise UsageError(f"the value of {printable(key)} {fault}", "give plain text")
        wanted[spelled] = text
    return wanted


def _demand_free(key: str) -> None:
    """Refuse keys that no tool could show or that are not for people to write."""
    why = (
        "is empty"
        if not key
        else f"has more than {_LONGEST} characters"
        if len(key) > _LONGEST
        else "is not written in printable ASCII without blanks"
        if not key.isascii() or not key.isprintable() or " " in key
        else "is the name of the metadata themselves"
        if key == "__metadata__"
        else f"is no tag: {_OWN[key]}"
        if key in _OWN
        else ""
    )
    if why:
        shown = printable(key[:_LONGEST])
        raise UsageError(f"the key '{shown}' {why}", f"short keys: {', '.join(SHORT)}")


def _value_fault(text: str) -> str:
    """Why a text may not be written, or "": whoever shows it may not be as careful as lorahub is."""
    if any(unicodedata.category(each) in {"Cc", "Cs"} and each not in "\n\t" for each in text):
        return "holds control characters"
    if any(each in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069" for each in text):
        return "holds characters that change the direction of text"
    return ""


def _demand_same(file: Path, old: Header, encoded: bytes) -> None:
    """Refuse what would make another adapter of the file.

    Raises:
        UsageError: naming what would change.
    """
    new = parse_header(lambda at, count: encoded[at : at + count].ljust(count, b"\0"), _size(old, encoded), where="it")
    registry = load_registry()
    files = survey(file)

    numbers = _numbers(file, old)

    def read(header: Header) -> object:
        seen: AdapterFiles = replace(files, headers={file.name: header}, numbers={file.name: numbers})
        try:
            reading = recognise(seen, registry).reading
        except UnsupportedFormat:  # nobody's format: there is nothing to change
            return None
        except LorahubError as error:  # refused by its format: for the same reason afterwards, or it is a change
            return type(error)
        return reading.format, reading.groups, reading.shared, reading.parts, {each.code for each in reading.findings}

    if read(old) != read(new):
        raise UsageError(
            f"with these metadata {file} would be read as another adapter: its kinds, scales or format would change",
            "leave out the keys that its trainer wrote about the arithmetic, as ss_network_alpha",
        )


def _numbers(file: Path, header: Header) -> dict[str, bytes]:
    """The bytes of every tensor that may be a single number."""
    result = {}
    with open_regular(file) as opened:
        for key, info in header.tensors.items():
            if info.nbytes <= _WIDEST:
                buffer = bytearray(info.nbytes)
                read_into(opened, header.span(key)[0], buffer)
                result[key] = bytes(buffer)
    return result


def _size(old: Header, encoded: bytes) -> int:
    return len(encoded) + old.size - old.data_start


def _write(file: Path, old: Header, encoded: bytes) -> None:
    """Put ``encoded`` before the tensors of ``file``: in a copy, which takes its place when it is on the disk.

    Raises:
        IntegrityError: the file is not what it was when its header was read.
        WriteFailed: the copy cannot be written.
    """
    with open_regular(file) as source:
        before = os.fstat(source.fileno())
        if header_of(source) != old:
            raise IntegrityError(f"{file} changed since its header was read", "try again")
        try:
            target, partial = new_partial(file)
            try:
                with target:
                    write_at(target, 0, encoded)
                    copy_range(source, old.data_start, target, len(encoded), old.size - old.data_start)
                    if hasattr(os, "fchmod"):
                        os.fchmod(target.fileno(), before.st_mode & 0o7777)
                    _demand_still(file, before, os.fstat(source.fileno()))
                    flush(target)
                put_in_place(partial, file)
            except BaseException:
                with suppress(OSError):
                    partial.unlink()
                raise
        except OSError as error:
            raise write_failed(file, error) from None


def _demand_still(file: Path, before: os.stat_result, after: os.stat_result) -> None:
    if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        raise IntegrityError(f"{file} changed while it was copied", "try again")


def _record(folder: Path) -> AdapterRecord | None:
    """The record beside the file; None where there is none that can be kept up to date."""
    with suppress(NotFound, RecordError):
        return AdapterRecord.load(folder / FILENAME)
    return None


def _is_fresh(record: AdapterRecord, file: Path) -> bool:
    recorded = record.files.get(file.name)
    return recorded is not None and file_digest(file) == (recorded.sha256, recorded.size)


def _update(record: AdapterRecord, file: Path) -> str:
    """Write the file's new digest into the record: after the file, so that a torn pair shows as stale."""
    sha256, size = file_digest(file)
    files = {**record.files, file.name: FileRecord(size=size, sha256=sha256)}
    atomic_write(file.with_name(FILENAME), record.changed(files=files).to_json().encode())
    return "updated"


def _demand_ours(file: Path) -> None:
    """Refuse a file that others rely on as it is.

    Raises:
        UsageError: it is a link, or lies in a folder that was pulled and verified.
    """
    if file.is_symlink():
        raise UsageError(f"{file} is a link, and what it points at may be shared", "copy the file, and tag the copy")
    if pin_of(file.parent.resolve()) is not None:
        raise UsageError(f"{file} was pulled, and is kept as the hub has it", "copy the folder, and tag the copy")
