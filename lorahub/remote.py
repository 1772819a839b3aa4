"""An adapter on a hub, recognised without its weights: parts of files in place of a folder.

Reads the JSON configs, the header of each weights file (its length, then exactly the header) and, where a format keeps
its numbers as tensors, those few bytes each.  What comes of it is what ``open_header`` gives for a folder, save that
nothing can be loaded from it.  Knows no format and no particular hub.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path, PurePosixPath
from typing import final

from lorahub.adapter import AdapterHeader, judge_record, recognise
from lorahub.bases.index import BaseIndex
from lorahub.deltas.disputes import Compat
from lorahub.deltas.kind import JSON
from lorahub.files.header import Header
from lorahub.findings import Finding
from lorahub.formats.format import AdapterFiles
from lorahub.formats.survey import LARGEST, as_config
from lorahub.hub.contents import is_weights, rule_for
from lorahub.hub.hub import Hub, Pin, Span
from lorahub.pinned import Cost, PinnedFiles
from lorahub.records import FILENAME, LIMIT, AdapterRecord
from lorahub.registry import Registry

__all__ = ["Cost", "can_read", "open_remote"]

_WIDEST = 8
"""Bytes of the widest single number."""


def can_read(pin: Pin) -> bool:
    """Whether the adapter's own folder has safetensors: other files have to be pulled to be looked into."""
    return any(is_weights(path) for path in _near(pin))


def open_remote(
    hub: Hub,
    pin: Pin,
    registry: Registry,
    cost: Cost,
    *,
    index: BaseIndex | None = None,
    compat: Compat | None = None,
) -> AdapterHeader:
    """The header of a pinned adapter; its ``folder`` is the pin's name and lies nowhere.

    Args:
        hub: where it is.
        pin: which state of it.
        registry: kinds and formats.
        cost: what is read is added to it.
        index: the base, to find its names among the keys.
        compat: see ``open_header``.

    Raises:
        HeaderError, IntegrityError: a file is malformed, or not what the pin says.
        UnsupportedFormat, UnsupportedKind: as ``open_header``.
        NotFound, AccessDenied, Offline, Unavailable: it cannot be had from here.
    """
    files = PinnedFiles(hub, pin, cost)
    where = Path(str(pin))
    names = _near(pin)
    texts = {name: files.parts(name, (0, _most(pin, name)))[0] for name in names if _is_config(name)}
    configs: dict[str, Mapping[str, JSON]] = {}
    for name, text in texts.items():
        if name != FILENAME and (config := as_config(text, PurePosixPath(str(where), name))) is not None:
            configs[name] = config
    headers = {name: files.header(name) for name in names if is_weights(name) and name.endswith(".safetensors")}
    surveyed = AdapterFiles(
        folder=where,
        headers=headers,
        configs=configs,
        others=tuple(name for name in names if name not in headers and name not in configs),
        numbers={name: _Numbers(files, name, header) for name, header in headers.items()},
        compat=compat,
    )
    record: AdapterRecord | None = None
    about_record: list[Finding] = []
    if FILENAME in texts:
        record, about_record = judge_record(
            lambda: AdapterRecord.from_json(texts[FILENAME], where=f"{where}/{FILENAME}"),
            lambda record: _stale(record, pin, texts),
        )
    said = [*about_record, *pin.said]
    return recognise(surveyed, registry, index=index, label=str(pin), record=record, said=said)


def _near(pin: Pin) -> list[str]:
    """The files of the adapter's own folder."""
    return sorted(name for name in pin.files if "/" not in name)


def _is_config(name: str) -> bool:
    return name.endswith(".json") and rule_for(name).role == "behaviour"


def _most(pin: Pin, name: str) -> int:
    """Bytes of a config that are read: all, or one more than it may have, which is refused as in a folder."""
    return min(pin.files[name].size, 1 + (LIMIT if name == FILENAME else LARGEST))


def _stale(record: AdapterRecord, pin: Pin, texts: Mapping[str, bytes]) -> tuple[str, ...]:
    """The recorded files that are not in the pin, or have other content as far as the pin and what was read tell."""

    def differs(name: str) -> bool:
        file = pin.files.get(name)
        if file is None or file.size != record.files[name].size:
            return True
        known = hashlib.sha256(texts[name]).hexdigest() if name in texts else file.sha256
        return known is not None and known != record.files[name].sha256

    return tuple(sorted(filter(differs, record.files)))


@final
@dataclass(slots=True)
class _Numbers(Mapping[str, bytes]):
    """The tensors of one element in a file, read all together when the first of them is asked for."""

    files: PinnedFiles
    name: str
    header: Header
    found: dict[str, bytes] = field(default_factory=dict)

    def _spans(self) -> dict[str, Span]:
        return {
            key: self.header.span(key)
            for key, info in self.header.tensors.items()
            if prod(info.shape) == 1 and info.nbytes <= _WIDEST
        }

    def __getitem__(self, key: str) -> bytes:
        if not self.found:
            spans = self._spans()
            self.found = dict(zip(spans, self.files.parts(self.name, *spans.values()), strict=True))
        return self.found[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._spans())

    def __len__(self) -> int:
        return len(self._spans())
