"""What a file is whose header nobody can read, from its first bytes; nothing is unpickled.

A zip's table of contents tells enough to name what is in one.  Knows no formats and no adapters.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

from lorahub.files.raw import open_regular, read_into

__all__ = ["PICKLE", "is_pointer", "of_any_name", "of_pickles_name"]

PICKLE = "is a Python pickle, which is never opened here: it can run any code"
"""What is said of one."""

_SCALAR = 8
"""Bytes of the widest single number."""

_LFS = b"version https://git-lfs"
_GGLA = (b"algg", b"ggla")
_PICKLED = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))
_MAGIC = (
    (b"PK\x03\x04", "it is a zip archive, as PyTorch's pickles are; under their names (.pt, .bin) it is looked into"),
    (b"GGUF", "it is GGUF, which is read under a name that ends in .gguf"),
    (b"\x89PNG", "it is a picture"),
    (b"\xff\xd8\xff", "it is a picture"),
)
"""First bytes of other files -> what they are, in words."""


def of_pickles_name(path: Path) -> str:
    """What a file with a pickle's name is, as a predicate."""
    return _fault(path) or PICKLE


def of_any_name(path: Path) -> str:
    """What a file is whose name says nothing, and which is no weights file, as a predicate."""
    if fault := _fault(path):
        return fault
    return PICKLE if _starts(path, 2) in _PICKLED else f"is no weights file: {_content(path)}"


def _fault(path: Path) -> str:
    """Why a file holds no tensors of any use, or "" where that cannot be seen."""
    size = path.stat().st_size
    if is_pointer(path):
        return "is a Git LFS pointer, not the file itself"
    if not size:
        return "is empty (0 bytes)"
    if _starts(path, 4) in _GGLA:
        return (
            "is an adapter of llama.cpp before GGUF (magic ggla), which llama.cpp itself reads no more: convert the "
            "PEFT folder it came from again, with convert_lora_to_gguf.py"
        )
    sizes = list(_storages(path))
    if sizes and max(sizes) <= _SCALAR:
        return f"holds single numbers only ({len(sizes)} of them): no factors, so nothing that changes a weight"
    return ""


def _content(path: Path) -> str:
    """What the first bytes of a file say."""
    start = _starts(path, 512)
    found = next((what for magic, what in _MAGIC if start.startswith(magic)), "")
    if found:
        return found
    try:
        text = start.decode()
    except UnicodeDecodeError as error:  # a character that is cut off at the end is text too
        text = start[: error.start].decode() if error.start > len(start) - 4 else ""
    readable = text and all(letter.isprintable() or letter.isspace() for letter in text)
    return "it holds text" if readable else "its first bytes are no header of safetensors"


def is_pointer(path: Path) -> bool:
    """Whether it is what Git keeps in place of a large file."""
    return _starts(path, len(_LFS)) == _LFS


def _starts(path: Path, length: int) -> bytes:
    """The first bytes of a file, fewer where it has fewer."""
    with open_regular(path) as file:
        start = bytearray(min(length, path.stat().st_size))
        read_into(file, 0, start)
    return bytes(start)


def _storages(path: Path) -> Iterator[int]:
    """Bytes of each tensor storage in a PyTorch zip, from the table of contents; none for other files."""
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if "/data/" in entry.filename:
                    yield entry.file_size
    except (
        zipfile.BadZipFile,
        struct.error,
        OSError,
        ValueError,
        NotImplementedError,
    ):  # damaged, or no zip: nothing to tell
        return
