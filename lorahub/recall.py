"""What was made of a header before, for headers that say the same: folders hold many adapters of one trainer and base.

Remembered is what an answer depended on, not what it might depend on: the tensors' names and shapes, the metadata that
were looked at, the numbers that were read, and the configs beside it.  A header that agrees in all of that gives the
same answer without being gone through again.  A file's own name does not count: formats look at names only to choose
among several.  Knows no formats and nothing of what is made.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import repeat
from pathlib import Path
from typing import Generic, TypeAlias, TypeVar, final, overload

from lorahub.deltas.kind import JSON
from lorahub.errors import IntegrityError
from lorahub.files.entries import Tensors
from lorahub.files.header import Header, TensorInfo
from lorahub.files.raw import open_regular
from lorahub.formats.format import AdapterFiles
from lorahub.formats.numbers import Together

__all__ = ["Recall"]

_Spans: TypeAlias = "tuple[Sequence[int], Sequence[int]]"
"""Bytes of the data section: where each span begins, and how many it has."""

T = TypeVar("T")
V = TypeVar("V")

_MOST = 16
"""Answers kept for one structure; in practice its alphas differ between a few values."""

_STRUCTURES = 64
"""Structures kept at a time; the oldest goes."""

_WIDEST = 8
"""Bytes of the widest single number."""


class _Watched(Mapping[str, V], Generic[V]):
    """A mapping that notes what it is asked for."""

    def __init__(self, of: Mapping[str, V]) -> None:
        self.of = of
        self.asked: dict[str, V | None] = {}
        self.every = False

    def __getitem__(self, key: str) -> V:
        found = self.get(key)
        if found is None:
            raise KeyError(key)
        return found

    @overload
    def get(self, key: str, /) -> V | None: ...
    @overload
    def get(self, key: str, /, default: V | T) -> V | T: ...
    def get(self, key: str, /, default: V | T | None = None) -> V | T | None:
        """As of any mapping; most keys that formats ask for are not there, and an error for each takes long."""
        found = self.asked[key] = self.of.get(key)
        return default if found is None else found

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self.get(key) is not None

    def __iter__(self) -> Iterator[str]:
        self.every = True
        return iter(self.of)

    def __len__(self) -> int:
        self.every = True
        return len(self.of)


class _Stored(Together):
    """The single numbers of a weights file, which notes those that are read."""

    def __init__(self, path: Path, header: Header) -> None:
        self._path, self._header = path, header
        self.asked: dict[str, bytes] = {}

    def several(self, keys: Collection[str]) -> Sequence[bytes]:
        found = _read(self._path, self._header.data_start, _spans(self._header, keys))
        self.asked.update(zip(keys, found, strict=True))
        return found

    def all_of(self, keys: Collection[str]) -> dict[str, bytes]:
        """Those of these tensors, by key."""
        return dict(zip(keys, self.several(keys), strict=True)) if keys else {}

    def __getitem__(self, key: str) -> bytes:
        if self._header.tensors[key].nbytes > _WIDEST:
            raise KeyError(key)
        return self.several([key])[0]

    def __iter__(self) -> Iterator[str]:
        return (key for key, info in self._header.tensors.items() if info.nbytes <= _WIDEST)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _spans(header: Header, keys: Collection[str]) -> _Spans:
    """Where in the data section these tensors lie."""
    tensors = header.tensors
    if isinstance(tensors, Tensors):
        return tensors.spans(keys)
    each = [tensors[key] for key in keys]
    return [info.start for info in each], [info.nbytes for info in each]


def _read(path: Path, start: int, spans: _Spans) -> list[bytes]:
    """The bytes of some tensors; ``start``: where the data section begins.

    Raises:
        IntegrityError: the file ends before them.
    """
    begin, lengths = spans
    offsets = map(start.__add__, begin)
    with open_regular(path) as file:
        if hasattr(os, "pread"):
            data = list(map(os.pread, repeat(file.fileno()), lengths, offsets))
        else:
            data = [_sought(file, offset, length) for offset, length in zip(offsets, lengths, strict=True)]
    if sum(map(len, data)) != sum(lengths):
        raise IntegrityError(f"{path} ends before its tensors do", "it changed while it was read: try again")
    return data


def _sought(file: io.FileIO, offset: int, length: int) -> bytes:
    file.seek(offset)
    return file.read(length) or b""


@dataclass(frozen=True, slots=True)
class _Answer(Generic[T]):
    """What was made, and all that it depended on besides the structure."""

    made: T
    configs: Mapping[str, Mapping[str, JSON]]
    metadata: Mapping[str, str | None]
    every: bool
    numbers: Mapping[str, bytes]

    def agrees(self, files: AdapterFiles, header: Header) -> bool:
        """Whether all of that is the same again, the numbers not looked at."""
        if self.configs is not files.configs and self.configs != files.configs:
            return False
        if self.every:
            return dict(header.metadata) == self.metadata
        return all(header.metadata.get(key) == text for key, text in self.metadata.items())


@final
@dataclass(slots=True)
class Recall(Generic[T]):
    """``make``, remembered.

    Attributes:
        make: from surveyed files to an answer; what it raises is not remembered.
    """

    make: Callable[[AdapterFiles], T]
    _answers: dict[int, tuple[Mapping[str, TensorInfo], list[_Answer[T]]]] = field(default_factory=dict)

    def of(self, files: AdapterFiles) -> T:
        """What ``make`` gives for these files."""
        if len(files.headers) != 1:
            return self.make(files)
        ((name, header),) = files.headers.items()
        path = files.folder / name
        # By identity: headers of one structure share their tensors, see ``parse_header``; kept here, so that they stay.
        if id(header.tensors) not in self._answers and len(self._answers) >= _STRUCTURES:
            del self._answers[next(iter(self._answers))]
        _, answers = self._answers.setdefault(id(header.tensors), (header.tensors, []))
        read: dict[str, bytes] = {}
        for answer in answers:
            if answer.agrees(files, header):
                if read.keys() != answer.numbers.keys():
                    read = _Stored(path, header).all_of(answer.numbers)
                if read == answer.numbers:
                    return answer.made
        metadata, numbers = _Watched(header.metadata), _Stored(path, header)
        made = self.make(replace(files, headers={name: replace(header, metadata=metadata)}, numbers={name: numbers}))
        answers[_MOST - 1 :] = []
        answers.append(
            _Answer(
                made=made,
                configs=files.configs,
                metadata=dict(header.metadata) if metadata.every else metadata.asked,
                every=metadata.every,
                numbers=numbers.asked,
            )
        )
        return made
