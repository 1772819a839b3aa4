"""Digests of files and of the tensors in them, in bounded memory.

A file's sha256 says that the bytes are the same; the tensors' digest says that the weights are, whatever order,
padding and metadata a writer chose.  No torch.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping

from lorahub.errors import IntegrityError
from lorahub.files.header import Header, TensorInfo
from lorahub.files.raw import CHUNK, open_regular, read_into

__all__ = ["data_digest", "digest_tensors", "file_digest", "git_blob_sha1", "tensors_digest"]


def file_digest(path: str | os.PathLike[str]) -> tuple[str, int]:
    """(sha256 in hex, bytes) of a file.

    Raises:
        NotFound, AccessDenied, Unavailable: it cannot be read.
        IntegrityError: it changed meanwhile.
    """
    sha = hashlib.sha256()
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        for chunk in _chunks(file, 0, size):
            sha.update(chunk)
    return sha.hexdigest(), size


def data_digest(path: str | os.PathLike[str], header: Header) -> str:
    """sha256 in hex of everything behind a safetensors file's header: equal however its metadata was edited.

    Raises:
        NotFound, AccessDenied, Unavailable: the file cannot be read.
        IntegrityError: it is not the one the header was read from.
    """
    sha = hashlib.sha256()
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size != header.size:
            raise IntegrityError(f"{os.fspath(path)} has {size} bytes and its header was read from {header.size}")
        for chunk in _chunks(file, header.data_start, size - header.data_start):
            sha.update(chunk)
    return sha.hexdigest()


def git_blob_sha1(path: str | os.PathLike[str]) -> str:
    """The id git gives a file's content (40 hex digits): what a Hub reports for files outside LFS.

    Raises:
        NotFound, AccessDenied, Unavailable: it cannot be read.
        IntegrityError: it changed meanwhile.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        sha = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        for chunk in _chunks(file, 0, size):
            sha.update(chunk)
    return sha.hexdigest()


def tensors_digest(path: str | os.PathLike[str], header: Header) -> str:
    """``sha256:`` over the tensors of a file, see ``digest_tensors``.

    Raises:
        NotFound, AccessDenied, Unavailable: the file cannot be read.
        IntegrityError: it is not the one the header was read from.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size != header.size:
            raise IntegrityError(f"{os.fspath(path)} has {size} bytes and its header was read from {header.size}")
        return digest_tensors(header.tensors, lambda name: _chunks(file, *header.span(name)))


def digest_tensors(tensors: Mapping[str, TensorInfo], chunks: Callable[[str], Iterator[memoryview]]) -> str:
    """``sha256:`` over sorted (name, dtype, shape, raw bytes).

    For each name, in code point order: the line ``["name","DTYPE",[shape],bytes]`` as compact JSON in UTF-8, a
    newline, and the raw bytes; that of a tensor whose axes are reversed ends in ``"turned"``.  The count in the line
    makes the encoding unambiguous.

    Args:
        tensors: name -> dtype, shape, size.
        chunks: gives the raw bytes of a name, in pieces.
    """
    sha = hashlib.sha256()
    for name in sorted(tensors):
        info = tensors[name]
        line = [name, info.dtype, list(info.shape), info.nbytes, *(["turned"] if info.turned else [])]
        sha.update(json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
        for chunk in chunks(name):
            sha.update(chunk)
    return f"sha256:{sha.hexdigest()}"


def _chunks(file: io.FileIO, offset: int, length: int) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(min(CHUNK, length)))
    for start in range(offset, offset + length, CHUNK):
        part = buffer[: offset + length - start]
        read_into(file, start, part)
        yield part
