"""What was made of a header before, for headers that say the same: folders hold many adapters of one trainer and base.

Remembered is what an answer depended on, not what it might depend on: the tensors' names and shapes, the metadata that
were looked at, the numbers that were read, and the configs beside it.  A header that agrees in all of that gives the
same answer without being gone through again.  A file's own name does not count: formats look at names only to choose
among several.  Knows no formats and nothing of what is made.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Generic, TypeAlias, TypeVar, final

from lorahub.deltas.kind import JSON
from lorahub.errors import IntegrityError
from lorahub.files.header import Header, TensorInfo
from lorahub.files.raw import open_regular
from lorahub.formats.format import AdapterFiles

__all__ = ["Recall"]

_Span: TypeAlias = "tuple[int, int]"
"""Bytes of the data section: (offset, how many)."""

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
        found = self.asked[key] = self.of.get(key)
        if found is None:
            raise KeyError(key)
        return found

    def __iter__(self) -> Iterator[str]:
        self.every = True
        return iter(self.of)

    def __len__(self) -> int:
        self.every = True
        return len(self.of)


class _Stored(Mapping[str, bytes]):
    """The single numbers of a weights file, read one by one."""

    def __init__(self, path: Path, header: Header) -> None:
        self._path, self._header = path, header

    def __getitem__(self, key: str) -> bytes:
        info = self._header.tensors[key]
        if info.nbytes > _WIDEST:
            raise KeyError(key)
        return _read(self._path, self._header.data_start, [(info.start, info.nbytes)])

    def __iter__(self) -> Iterator[str]:
        return (key for key, info in self._header.tensors.items() if info.nbytes <= _WIDEST)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _read(path: Path, start: int, spans: Sequence[_Span]) -> bytes:
    """The bytes of some tensors, one after the other; ``start``: where the data section begins.

    Raises:
        IntegrityError: the file ends before them.
    """
    with open_regular(path) as file:
        if hasattr(os, "pread"):
            pread, handle = os.pread, file.fileno()
            data = b"".join([pread(handle, length, start + offset) for offset, length in spans])
        else:
            data = b"".join([_sought(file, start + offset, length) for offset, length in spans])
    if len(data) != sum(length for _, length in spans):
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
    spans: tuple[_Span, ...]
    numbers: bytes

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
        spans, read = None, b""
        for answer in answers:
            if answer.agrees(files, header):
                if spans != answer.spans:
                    spans, read = answer.spans, _read(path, header.data_start, answer.spans)
                if read == answer.numbers:
                    return answer.made
        metadata, numbers = _Watched(header.metadata), _Watched(_Stored(path, header))
        made = self.make(replace(files, headers={name: replace(header, metadata=metadata)}, numbers={name: numbers}))
        asked = {key: found for key, found in numbers.asked.items() if found is not None}
        answers[_MOST - 1 :] = []
        answers.append(
            _Answer(
                made=made,
                configs=files.configs,
                metadata=dict(header.metadata) if metadata.every else metadata.asked,
                every=metadata.every,
                spans=tuple((header.tensors[key].start, header.tensors[key].nbytes) for key in asked),
                numbers=b"".join(asked.values()),
            )
        )
        return made
