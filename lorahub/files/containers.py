"""The files that weights come in, by suffix: how each one's header is read, without running code and under limits.

All give the same ``Header``: names, dtypes, shapes, where the bytes lie, and metadata as strings.  A file is what its
suffix says, and safetensors where that is none of these, or an error; nothing is tried in turn.  Knows nothing of
adapters.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import PurePath
from types import MappingProxyType
from typing import Protocol

from lorahub.errors import HeaderError, IntegrityError
from lorahub.files.gguf import parse_gguf
from lorahub.files.grammar import Malformed
from lorahub.files.header import Header, Known, Limits, Read, parse_header
from lorahub.files.npz import parse_npz
from lorahub.files.raw import open_regular, read_bytes, read_into

__all__ = [
    "CONTAINERS",
    "Container",
    "container_of",
    "is_safetensors",
    "parse_weights",
    "read_weights_header",
    "weights_header_of",
]


class Parser(Protocol):
    """Reads a header from ranges; raises ``Malformed``, whatever the bytes."""

    def __call__(self, read: Read, size: int, limits: Limits) -> Header: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """One kind of file.

    Attributes:
        title: how people call it.
        parse: its header reader; None for safetensors, whose own reader is used.
    """

    title: str
    parse: Parser | None = None


CONTAINERS: Mapping[str, Container] = MappingProxyType(
    {
        ".safetensors": Container(title="safetensors"),
        ".npz": Container(title="numpy's .npz", parse=parse_npz),
        ".gguf": Container(title="GGUF", parse=parse_gguf),
    }
)
"""Suffix -> container; in a folder, files of an earlier row are preferred to those of a later one."""


_LENGTH = 8
"""Bytes in front of a safetensors header, which say how long it is."""


def container_of(name: str | os.PathLike[str]) -> str:
    """The suffix in ``CONTAINERS`` that a file's name ends in, in lower case; ".safetensors" for any other name."""
    suffix = PurePath(name).suffix.lower()
    return suffix if suffix in CONTAINERS else ".safetensors"


def is_safetensors(path: str | os.PathLike[str]) -> bool:
    """Whether a local file begins as safetensors do, whatever its name: a length that fits into it, and JSON's ``{``.

    Raises:
        NotFound: there is no regular file.
        AccessDenied: it may not be read.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size <= _LENGTH:
            return False
        start = bytearray(_LENGTH + 1)
        read_into(file, 0, start)
    length = int.from_bytes(start[:_LENGTH], "little")
    return start[_LENGTH:] == b"{" and 2 <= length <= size - _LENGTH


def read_weights_header(
    path: str | os.PathLike[str], limits: Limits | None = None, known: Known | None = None
) -> Header:
    """The header of a local weights file in any container; ``known`` is as for ``parse_header``.

    Raises:
        HeaderError: the file is malformed, or over the limits.
        NotFound: there is no regular file.
        AccessDenied: it may not be read.
    """
    with open_regular(path) as file:
        return weights_header_of(file, limits, known)


def weights_header_of(file: io.FileIO, limits: Limits | None = None, known: Known | None = None) -> Header:
    """The header of an open weights file, which stays open.

    Raises:
        HeaderError: as ``read_weights_header``.
    """
    size = os.fstat(file.fileno()).st_size
    return parse_weights(partial(read_bytes, file), size, where=str(file.name), limits=limits, known=known)


def parse_weights(
    read: Read, size: int, *, where: str, limits: Limits | None = None, known: Known | None = None
) -> Header:
    """The header of anything that can be read in ranges; ``where`` is its name, whose suffix says what it is.

    Raises:
        HeaderError: the content is not well-formed, or is over the limits; nothing else, whatever the bytes.
    """
    container = CONTAINERS[container_of(where)]
    if container.parse is None:
        return parse_header(read, size, where=where, limits=limits, known=known)
    try:
        return container.parse(read, size, limits or Limits())
    except Malformed as fault:
        hint = fault.hint or f"the file is damaged or was not written as {container.title}: fetch it again"
        raise HeaderError(f"{where}: {fault.reason}", hint) from None
    except IntegrityError as error:  # the file changed while it was read
        raise HeaderError(f"{where}: {error.message}", error.hint) from None
