"""Read the headers of ``.npz`` archives as ``numpy.savez`` and ``mlx.core.savez`` write them, without numpy.

A zip of ``.npy`` files, stored as they are.  The table of contents and every array's header are walked under limits
and nothing is unpacked: an entry that is compressed, encrypted, pickled (dtype object) or big-endian is refused
with the reason.  The result is a ``Header`` whose positions are absolute.  Knows nothing of adapters.

Formats: PKWARE's APPNOTE (end of central directory, zip64 extra fields) and numpy's ``.npy`` versions 1 to 3.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType

from lorahub.files.dtypes import DTYPES
from lorahub.files.grammar import Malformed, show
from lorahub.files.header import Header, Limits, Read, TensorInfo, name_fault

__all__ = ["parse_npz"]

_END, _ENTRY, _LOCAL = b"PK\x05\x06", b"PK\x01\x02", b"PK\x03\x04"
_END64, _END64_AT = b"PK\x06\x06", b"PK\x06\x07"
_TAIL = 22 + 0xFFFF  # the end record, and the longest comment behind it
_NPY = b"\x93NUMPY"
_NPY_HEADER = 10_000  # numpy refuses longer ones itself
_DESCRIPTOR = 24  # bytes that may follow an entry that was written to a pipe
_WIDE = 0xFFFFFFFF  # "see the zip64 extra field"
_AGAIN = "save it again with numpy.savez or mlx.core.savez"

_CODES: Mapping[str, str] = {
    "b1": "BOOL",
    "u1": "U8",
    "i1": "I8",
    "i2": "I16",
    "u2": "U16",
    "f2": "F16",
    "V2": "BF16",  # as MLX and ml_dtypes call it; no other two-byte void is known in weights
    "i4": "I32",
    "u4": "U32",
    "f4": "F32",
    "c8": "C64",
    "f8": "F64",
    "i8": "I64",
    "u8": "U64",
}

# Written by numpy with sorted keys, by MLX in the same order with other commas.
_HEADER = re.compile(
    r"\{\s*'descr'\s*:\s*(?P<descr>'[^']*'|\[.*\])\s*,\s*'fortran_order'\s*:\s*(?P<fortran>True|False)\s*,"
    r"\s*'shape'\s*:\s*\((?P<shape>[\d,\s]*)\)\s*,?\s*\}\s*",
    re.ASCII | re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class _Entry:
    """One file in the archive: its name, where its local header begins, and its bytes."""

    name: str
    at: int
    size: int


def parse_npz(read: Read, size: int, limits: Limits) -> Header:
    """The header of an archive that can be read in ranges.

    Args:
        read: gives exactly the bytes asked for.
        size: bytes of the whole file.
        limits: how much the table of contents may ask for.

    Raises:
        Malformed: it is no archive of plain arrays, or is over the limits.
    """
    tensors: dict[str, TensorInfo] = {}
    end, previous = 0, "the start of the file"
    entries, contents = _entries(read, size, limits)
    for entry in sorted(entries, key=lambda each: each.at):
        what = f"entry {show(entry.name)}"
        if entry.at < end:
            raise Malformed(f"{what} overlaps {previous}")
        if entry.at > end + _DESCRIPTOR:
            raise Malformed(f"{entry.at - end} bytes lie between {previous} and {what} and belong to none")
        start = _data_start(read, entry, contents, what)
        end, previous = start + entry.size, what
        if end > contents:
            raise Malformed(f"{what} reaches into the table of contents")
        name = entry.name.removesuffix(".npy")
        if name == entry.name:
            raise Malformed(
                f"{what} is no array (.npy)",
                "this is no archive of numpy or MLX: if it is a PyTorch file, its name ends in .pt or .bin",
            )
        if fault := name_fault(name, limits):
            raise Malformed(f"the tensor name {show(name)} {fault}")
        if name in tensors:
            raise Malformed(f"the tensor {show(name)} appears twice")
        tensors[name] = _array(read, start, entry.size, f"tensor {show(name)}")
    return Header(tensors=MappingProxyType(tensors), metadata=MappingProxyType({}), data_start=0, size=size)


def _entries(read: Read, size: int, limits: Limits) -> tuple[list[_Entry], int]:
    """The table of contents, and where it begins."""
    if size == 0:
        raise Malformed("the file is empty (0 bytes)", "an interrupted download leaves such a file: fetch it again")
    tail = read(max(0, size - _TAIL), min(size, _TAIL))
    at = tail.rfind(_END)
    if at < 0 or len(tail) - at < 22:
        begins = "begins like one, and was cut off" if read(0, min(size, 4)) == _LOCAL else "is none"
        raise Malformed(f"an .npz file is a zip archive, and this {begins}")
    count, length, start = struct.unpack_from("<HII", tail, at + 10)
    if count == 0xFFFF or _WIDE in (length, start):
        count, length, start = _zip64(read, tail, at, size)
    if start + length > size - 22 or length > limits.header:
        raise Malformed(f"the table of contents claims {length} bytes from {start} on, in a file of {size}")
    if count > limits.tensors:
        raise Malformed(
            f"the archive claims {count} entries, more than {limits.tensors}",
            "if you trust the file, raise the limit: Limits(tensors=...)",
        )
    raw, entries, at = read(start, length) if length else b"", [], 0
    for _ in range(count):
        entry, at = _entry(raw, at)
        entries.append(entry)
    if at != length:
        raise Malformed(f"the table of contents has {length} bytes, and its {count} entries take {at}")
    return entries, start


def _zip64(read: Read, tail: bytes, at: int, size: int) -> tuple[int, int, int]:
    """Count, length and start from the 64-bit end record."""
    if at < 20 or tail[at - 20 : at - 16] != _END64_AT:
        raise Malformed("the archive needs a 64-bit end record and has none")
    (where,) = struct.unpack_from("<Q", tail, at - 12)
    if where > size - 56:
        raise Malformed("the archive's 64-bit end record lies outside the file")
    record = read(where, 56)
    if record[:4] != _END64:
        raise Malformed("the archive's 64-bit end record is not where it should be")
    count, length, start = struct.unpack_from("<QQQ", record, 32)
    return count, length, start


def _entry(raw: bytes, at: int) -> tuple[_Entry, int]:
    """The entry at ``at`` of the table of contents, and where the next begins."""
    if raw[at : at + 4] != _ENTRY or len(raw) - at < 46:
        raise Malformed("the table of contents is damaged, or cut off")
    flags, method = struct.unpack_from("<HH", raw, at + 8)
    packed, size, name_length, extra_length, comment = struct.unpack_from("<IIHHH", raw, at + 20)
    (offset,) = struct.unpack_from("<I", raw, at + 42)
    end = at + 46 + name_length + extra_length + comment
    if end > len(raw):
        raise Malformed("the table of contents is cut off")
    try:
        name = raw[at + 46 : at + 46 + name_length].decode()
    except UnicodeDecodeError:
        raise Malformed("the table of contents holds a name that is not UTF-8") from None
    if flags & 1:
        raise Malformed(f"entry {show(name)} is encrypted", _AGAIN)
    if method:
        raise Malformed(
            f"entry {show(name)} is compressed (method {method}), and only stored arrays are read: unpacking can "
            "make any size out of any other",
            "save it again with numpy.savez instead of numpy.savez_compressed",
        )
    extra = raw[at + 46 + name_length : at + 46 + name_length + extra_length]
    packed, size, offset = _widened(extra, {"packed": packed, "size": size, "offset": offset}, name)
    if packed != size:
        raise Malformed(f"entry {show(name)} is stored, and yet takes {packed} bytes for {size}")
    return _Entry(name, offset, size), end


def _widened(extra: bytes, values: dict[str, int], name: str) -> tuple[int, int, int]:
    """Sizes and offset, those that did not fit from the zip64 extra field."""
    missing = [key for key in ("size", "packed", "offset") if values[key] == _WIDE]
    if missing:
        at = 0
        while at + 4 <= len(extra):
            tag, length = struct.unpack_from("<HH", extra, at)
            if tag == 1 and length >= 8 * len(missing) and at + 4 + length <= len(extra):
                wide = struct.unpack_from(f"<{len(missing)}Q", extra, at + 4)
                values |= dict(zip(missing, wide, strict=True))
                break
            at += 4 + length
        else:
            raise Malformed(f"entry {show(name)} needs 64-bit sizes and has none")
    return values["packed"], values["size"], values["offset"]


def _data_start(read: Read, entry: _Entry, contents: int, what: str) -> int:
    """Where an entry's bytes begin, behind its local header."""
    if entry.at + 30 > contents:
        raise Malformed(f"{what} lies outside the file")
    local = read(entry.at, 30)
    if local[:4] != _LOCAL:
        raise Malformed(f"{what} is not where the table of contents says")
    method, name_length, extra_length = struct.unpack_from("<8xH16xHH", local)
    if entry.at + 30 + name_length + extra_length > contents:
        raise Malformed(f"{what} lies outside the file")
    if method or read(entry.at + 30, name_length) != entry.name.encode():
        raise Malformed(f"{what} is another in its own header than in the table of contents")
    return entry.at + 30 + int(name_length) + int(extra_length)


def _array(read: Read, start: int, size: int, what: str) -> TensorInfo:
    """One ``.npy``: dtype, shape, and where its elements lie."""
    first = read(start, min(size, 12)) if size else b""
    if first[:6] != _NPY or len(first) < 12:
        raise Malformed(f"{what} is no numpy array")
    version = first[6]
    if version not in (1, 2, 3):
        raise Malformed(f"{what} is of version {version} of the numpy format, and 1 to 3 are known")
    wide = version > 1
    (length,) = struct.unpack_from("<I" if wide else "<H", first, 8)
    begin = 12 if wide else 10
    if length > min(_NPY_HEADER, size - begin):
        raise Malformed(f"{what} claims a header of {length} bytes")
    text = read(start + begin, length).decode("latin-1")
    found = _HEADER.fullmatch(text)
    if found is None:
        raise Malformed(f"{what} has a header that numpy does not write: {show(text.strip())}")
    dtype = _code(found["descr"], what)
    shape = _shape(found["shape"], what)
    nbytes = DTYPES[dtype].bits // 8 * prod(shape)
    data = start + begin + length
    if nbytes != size - begin - length:
        raise Malformed(
            f"{what} takes {nbytes} bytes as {dtype} {list(shape)}, and its entry has {start + size - data}"
        )
    turned = found["fortran"] == "True" and sum(each > 1 for each in shape) > 1
    return TensorInfo(dtype, shape, data, data + nbytes, turned)


def _code(descr: str, what: str) -> str:
    """The safetensors code of an array's dtype."""
    kind = descr.strip("'")
    order, plain = kind[:1], kind.lstrip("<>|=")
    if "O" in kind:
        raise Malformed(f"{what} holds Python objects, which are a pickle and can run any code", _AGAIN)
    if order == ">":
        raise Malformed(f"{what} is big-endian ({show(kind)})", "save it again through .astype('<f4')")
    if plain not in _CODES or not descr.startswith("'"):
        raise Malformed(f"{what} has the dtype {show(kind)}, which no weights have")
    return _CODES[plain]


def _shape(text: str, what: str) -> tuple[int, ...]:
    sizes = [each.strip() for each in text.split(",") if each.strip()]
    if len(sizes) > 32 or not all(each.isdigit() and len(each) < 20 for each in sizes):
        raise Malformed(f"{what} has the shape {show(text)}")
    shape = tuple(int(each) for each in sizes)
    if prod(each for each in shape if each) >= 1 << 63:
        raise Malformed(f"{what} has a shape too large to count: {show(text)}")
    return shape
