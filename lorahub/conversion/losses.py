"""What a conversion has to say for itself: what was not carried, and what goes into the record of the result.

Sentences and record fields; knows no tensors.  A file's own metadata is carried where the record has a field for it,
and otherwise listed by name, never by value: it may hold captions and paths of the machine that trained it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from lorahub.adapter import AdapterHeader
from lorahub.conversion.carry import Misfit
from lorahub.files.pickles import ORIGIN
from lorahub.findings import Finding
from lorahub.formats.dotted_metadata import METADATA
from lorahub.records import SCHEMA_VERSION, AdapterRecord, is_path

__all__ = ["about_metadata", "told", "with_metadata"]

_UNDERSTOOD = frozenset({"format", "lorahub", "lorahub.compat", "lorahub.modules", METADATA, ORIGIN})
"""Header keys whose content the deltas hold, or that say nothing of the adapter."""

_READ: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"cloneofsimo": ("text_encoder", "unet"), "gguf": ("adapter.", "general.architecture", "general.type")}
)
"""Format -> how header keys begin that it reads itself."""

_FIELDS: Mapping[str, str] = MappingProxyType(
    {
        "modelspec.title": "title",
        "modelspec.description": "description",
        "modelspec.author": "authors",
        "modelspec.license": "license",
        "modelspec.trigger_phrase": "trigger_words",
        "modelspec.usage_hint": "usage_hint",
        "modelspec.tags": "tags",
    }
)
"""Header key -> record field."""

_LISTS = frozenset({"authors", "tags", "trigger_words"})

_SHOWN = 5


def told(
    findings: Sequence[Finding],
    allowed: Collection[str],
    left_out: Mapping[str, int],
    misfits: Sequence[Misfit],
    unread: Sequence[str],
    said: str = "",
) -> list[str]:
    """What is not in the result, a sentence each.

    Args:
        findings: the source's.
        allowed: codes that were allowed.
        left_out: component -> targets left out for ``--component``.
        misfits: modules without a word that were left out.
        unread: names of metadata that is not carried.
        said: what the component was called, where the format has no word for one.
    """
    lost = [each.show() for each in findings if each.allowable and each.code in allowed]
    if said:
        lost.append(f"the name of its component, {said!r}: the result is for that model alone")
    lost += [f"the component {name!r} was not asked for: {count} targets" for name, count in sorted(left_out.items())]
    lost += [
        f"left out, because {misfit.reason}: {', '.join(each.target.name for each in misfit.changes)}"
        for misfit in misfits
    ]
    if unread:
        more = f" and {len(unread) - _SHOWN} more" if len(unread) > _SHOWN else ""
        lost.append(f"metadata of the file that is not carried: {', '.join(unread[:_SHOWN])}{more}")
    return [
        text if not is_path(text) else f"{text.partition(':')[0]} (a path on one machine is left out)" for text in lost
    ]


def about_metadata(header: AdapterHeader, written: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Record fields from a file's metadata, and the names of what is carried nowhere.

    Args:
        header: the source.
        written: the metadata of the file that was written.
    """
    given = header.files.headers[header.reading.file].metadata
    read = (*_READ.get(header.format, ()), *header.reading.parts)
    fields: dict[str, Any] = {}
    unread = []
    for name, text in sorted(given.items()):
        if name in _UNDERSTOOD or written.get(name) == text or not text or name.startswith(read):
            continue
        field = _FIELDS.get(name)
        if field is None or is_path(text):
            unread.append(name)
        else:
            fields[field] = _items(text) if field in _LISTS else text
    return fields, unread


def _items(text: str) -> list[str]:
    """A list as trainers write it: JSON, or separated by commas."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    items = found if isinstance(found, list) else text.split(",")
    return [item.strip() for item in items if isinstance(item, str) and item.strip()]


def with_metadata(record: AdapterRecord | None, fields: Mapping[str, Any]) -> AdapterRecord:
    """The record, or a new one, with what a file's metadata says in fields that are empty."""
    start = record or AdapterRecord(schema_version=SCHEMA_VERSION, kinds=("unknown",))
    said = start.document()
    return start.changed(**{name: value for name, value in fields.items() if not said.get(name)})
