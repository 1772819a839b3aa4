"""Weights files written whole in the container that their name says: laid out first, then put in place at once.

The counterpart of ``containers``; safetensors has a streaming writer of its own.  Knows nothing of adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from lorahub.errors import CannotCarry, HeaderError, UsageError
from lorahub.files.atomic import flush, new_partial, put_in_place, write_failed
from lorahub.files.containers import CONTAINERS, container_of, parse_weights
from lorahub.files.dtypes import from_torch, nbytes, stored_shape
from lorahub.files.gguf_layout import encode_gguf
from lorahub.files.header import Header
from lorahub.files.raw import write_at
from lorahub.files.tensors import tensor_bytes
from lorahub.files.writer import Entries, encode_header, save_file
from lorahub.lazy import torch

__all__ = ["lay_out", "save_weights"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """A file before its tensors: everything in front of them, where each begins, and the size of it all."""

    encoded: bytes
    starts: Mapping[str, int]
    size: int


def _safetensors(entries: Entries, metadata: Mapping[str, str]) -> _Plan:
    encoded = encode_header(entries, metadata)
    return _Plan(encoded=encoded, starts={}, size=len(encoded) + _nbytes(entries))


def _gguf(entries: Entries, metadata: Mapping[str, str]) -> _Plan:
    encoded, starts, size = encode_gguf(entries, metadata)
    return _Plan(encoded=encoded, starts=starts, size=size)


_PLANS: Mapping[str, Callable[[Entries, Mapping[str, str]], _Plan]] = MappingProxyType(
    {".safetensors": _safetensors, ".gguf": _gguf}
)
"""Suffix -> how a file of that container is laid out; those without are read only."""


def lay_out(name: str, entries: Entries, metadata: Mapping[str, str]) -> Header:
    """The header that a file of that name with these tensors has, read back from what would be written.

    Raises:
        CannotCarry: files of this container are not written.
        UsageError, UnsupportedFormat: a name, shape, dtype or value that it cannot hold.
    """
    plan = _plan(name, entries, metadata)
    try:  # the data section, which does not exist yet, reads as zeros
        return parse_weights(
            lambda at, length: plan.encoded[at : at + length].ljust(length, b"\0"), plan.size, where=name
        )
    except HeaderError as error:
        raise UsageError(f"this cannot be written: {error.message}") from None


def _plan(name: str, entries: Entries, metadata: Mapping[str, str]) -> _Plan:
    suffix = container_of(name)
    if suffix not in _PLANS:
        raise CannotCarry(f"{CONTAINERS[suffix].title} files are read, not written: {name}")
    return _PLANS[suffix](entries, metadata)


def _nbytes(entries: Entries) -> int:
    return sum(nbytes(code, shape) for code, shape in entries.values())


def save_weights(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Path:
    """Write tensors to a file in the container that its suffix says; same tensors and metadata, same bytes.

    Raises:
        CannotCarry, UsageError, UnsupportedFormat: as ``lay_out``.
        WriteFailed: the file cannot be written; what was there stays.
    """
    if container_of(path) == ".safetensors":
        return save_file(path, tensors, metadata)
    entries: dict[str, tuple[str, Sequence[int]]] = {}
    for name, tensor in tensors.items():
        code = from_torch(tensor.dtype)
        entries[name] = (code, stored_shape(code, tensor.shape))
    lay_out(path.name, entries, metadata)
    plan = _plan(path.name, entries, metadata)
    try:
        file, partial = new_partial(path)
        try:
            with file:
                file.truncate(plan.size)
                write_at(file, 0, plan.encoded)
                for name, tensor in tensors.items():
                    write_at(file, plan.starts[name], tensor_bytes(tensor))
                flush(file)
            put_in_place(partial, path)
        except BaseException:
            with suppress(OSError):
                partial.unlink()
            raise
    except OSError as error:
        raise write_failed(path, error) from None
    return path
