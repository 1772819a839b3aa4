"""Read the headers of GGUF files, llama.cpp's container, under limits and without the ``gguf`` package.

A GGUF header is typed key-value pairs and a list of tensors, each with its sizes innermost first.  Here it becomes a
``Header``: sizes outermost first as torch has them, values as strings (numbers and flags as JSON, short arrays of
numbers as a JSON list, long ones and arrays of strings as their length).  Element types that torch lacks keep their
ggml name ("Q8_0") and can be turned into float32 where that is exact.  Knows nothing of adapters.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from math import prod
from types import MappingProxyType
from typing import Any

from lorahub.errors import MissingDependency, UnsupportedFormat
from lorahub.files.grammar import Malformed, show
from lorahub.files.header import Header, Limits, Read, TensorInfo, name_fault
from lorahub.lazy import torch

__all__ = [
    "ALIGNMENT",
    "DIMS",
    "EXACT",
    "MAGIC",
    "PLAIN",
    "QUANTISED",
    "SCALARS",
    "STRING",
    "WIDTH",
    "dequantise",
    "package",
    "padded",
    "parse_gguf",
]

MAGIC = b"GGUF"
ALIGNMENT = 32  # bytes, unless general.alignment says otherwise
DIMS = 4  # as many as ggml's tensors have
_LARGEST = 64 << 20  # bytes of a header; that of a whole model holds its tokenizer
_CHUNK = 1 << 20
_PAIRS = 65_536
_STRINGS = 2_000_000  # in all arrays together; the largest tokenizers have about a million
_SHOWN = 64  # elements of an array of numbers that are kept

_LENGTH = struct.Struct("<Q")
STRING, _ARRAY = 8, 9
SCALARS: Mapping[int, str] = MappingProxyType(
    {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
)
"""Type of a value -> how ``struct`` calls it; 8 are strings and 9 arrays."""

PLAIN: Mapping[int, str] = MappingProxyType(
    {0: "F32", 1: "F16", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 30: "BF16"}
)
"""ggml type -> safetensors code, for those that have one."""

WIDTH: Mapping[str, int] = MappingProxyType(
    {"F32": 4, "F16": 2, "I8": 1, "I16": 2, "I32": 4, "I64": 8, "F64": 8, "BF16": 2}
)

QUANTISED: Mapping[int, tuple[str, int, int]] = MappingProxyType(
    {
        2: ("Q4_0", 32, 18),
        3: ("Q4_1", 32, 20),
        6: ("Q5_0", 32, 22),
        7: ("Q5_1", 32, 24),
        8: ("Q8_0", 32, 34),
        9: ("Q8_1", 32, 40),
        10: ("Q2_K", 256, 84),
        11: ("Q3_K", 256, 110),
        12: ("Q4_K", 256, 144),
        13: ("Q5_K", 256, 176),
        14: ("Q6_K", 256, 210),
        15: ("Q8_K", 256, 292),
        16: ("IQ2_XXS", 256, 66),
        17: ("IQ2_XS", 256, 74),
        18: ("IQ3_XXS", 256, 98),
        19: ("IQ1_S", 256, 50),
        20: ("IQ4_NL", 32, 18),
        21: ("IQ3_S", 256, 110),
        22: ("IQ2_S", 256, 82),
        23: ("IQ4_XS", 256, 136),
        29: ("IQ1_M", 256, 56),
        34: ("TQ1_0", 256, 54),
        35: ("TQ2_0", 256, 66),
        39: ("MXFP4", 32, 17),
        40: ("NVFP4", 64, 36),
        41: ("Q1_0", 128, 18),
    }
)
"""ggml type -> (name, elements of a block, bytes of a block)."""

EXACT = frozenset({"Q4_0", "Q5_0", "Q8_0"})
"""Quantised types whose values float32 holds: a half-precision scale times an integer of at most eight bits."""


@dataclass(slots=True)
class _Cursor:
    """Reads a header piece by piece, never more than a chunk ahead."""

    read: Read
    size: int
    at: int = 0
    strings: int = 0
    _held: bytes = b""
    _from: int = 0

    def take(self, length: int, what: str) -> bytes:
        """The next bytes."""
        start = self._hold(length, what)
        self.at += length
        return self._held[start : start + length]

    def _hold(self, length: int, what: str) -> int:
        """Make sure that the next bytes are held; where they begin there."""
        if length > self.size - self.at:
            raise Malformed(
                f"the file is cut off in {what}: {length} bytes were expected, {self.size - self.at} follow"
            )
        if self.at + length > _LARGEST:
            raise Malformed(f"the header takes more than {_LARGEST} bytes")
        start = self.at - self._from
        if not 0 <= start <= start + length <= len(self._held):
            wanted = min(max(length, _CHUNK), self.size - self.at)
            self._held, self._from, start = self.read(self.at, wanted), self.at, 0
        return start

    def number(self, layout: str, what: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout), what))[0]

    def skip(self, length: int, what: str) -> None:
        if length > self.size - self.at:
            raise Malformed(f"the file is cut off in {what}: it claims {length} bytes, {self.size - self.at} follow")
        self.at += length
        if self.at > _LARGEST:
            raise Malformed(f"the header takes more than {_LARGEST} bytes")

    def skip_strings(self, count: int, what: str) -> None:
        """Pass over strings, each led by its length."""
        while count:
            start = self._hold(_LENGTH.size, what)
            held, last = self._held, len(self._held) - _LENGTH.size
            while count and start <= last:
                start += _LENGTH.size + _LENGTH.unpack_from(held, start)[0]
                count -= 1
            self.at = self._from
            self.skip(start, what)

    def text(self, limit: int, what: str) -> str:
        length = self.number("<Q", what)
        if length > limit:
            raise Malformed(f"{what} claims {length} characters, more than {limit}")
        try:
            return self.take(length, what).decode()
        except UnicodeDecodeError:
            raise Malformed(f"{what} is not UTF-8") from None


def parse_gguf(read: Read, size: int, limits: Limits) -> Header:
    """The header of a GGUF file that can be read in ranges.

    Args:
        read: gives exactly the bytes asked for.
        size: bytes of the whole file.
        limits: how much the header may ask for.

    Raises:
        Malformed: the content is no GGUF file, contradicts itself, or is over the limits.
    """
    cursor = _Cursor(read, size)
    tensors, pairs = _counts(cursor, limits)
    metadata: dict[str, str] = {}
    kept = 0
    for _ in range(pairs):
        key = cursor.text(limits.name, "a key")
        if key in metadata:
            raise Malformed(f"the key {show(key)} appears twice")
        if not key.isprintable() or not key:
            raise Malformed(f"the key {show(key)} cannot be printed")
        metadata[key] = _value(
            cursor, cursor.number("<I", f"the type of {show(key)}"), limits, f"the value of {show(key)}"
        )
        kept += len(key) + len(metadata[key])
        if kept > limits.metadata:
            raise Malformed(
                f"its keys and values take more than {limits.metadata} bytes",
                "if you trust the file, raise the limit: Limits(metadata=...)",
            )
    alignment = _alignment(metadata.get("general.alignment"))
    infos: dict[str, TensorInfo] = {}
    for _ in range(tensors):
        name, info = _tensor(cursor, limits, alignment)
        if name in infos:
            raise Malformed(f"the tensor {show(name)} appears twice")
        infos[name] = info
    start = padded(cursor.at, alignment)
    return Header(
        tensors=MappingProxyType(_laid_out(infos, size - start, alignment)),
        metadata=MappingProxyType(metadata),
        data_start=start,
        size=size,
    )


def _counts(cursor: _Cursor, limits: Limits) -> tuple[int, int]:
    if cursor.size == 0:
        raise Malformed("the file is empty (0 bytes)", "an interrupted download leaves such a file: fetch it again")
    magic = cursor.take(min(4, cursor.size), "its first bytes")
    if magic in (b"algg", b"ggla"):
        raise Malformed(
            "this is an adapter of llama.cpp before GGUF (magic ggla), which llama.cpp itself reads no more",
            "convert the PEFT folder it came from again, with convert_lora_to_gguf.py",
        )
    if magic != MAGIC:
        raise Malformed(f"the file begins with {show(magic.decode('latin-1'))}, not with GGUF")
    version = cursor.number("<I", "its version")
    if version not in (2, 3):
        if version in (2 << 24, 3 << 24):
            raise Malformed(
                "the file is big-endian, and little-endian ones are read", "convert it again on this machine"
            )
        raise Malformed(f"the file is of GGUF version {version}, and 2 and 3 are known", "convert it again")
    tensors, pairs = cursor.number("<Q", "the number of tensors"), cursor.number("<Q", "the number of keys")
    if tensors > limits.tensors:
        raise Malformed(
            f"the header claims {tensors} tensors, more than {limits.tensors}",
            "if you trust the file, raise the limit: Limits(tensors=...)",
        )
    if pairs > _PAIRS:
        raise Malformed(f"the header claims {pairs} keys, more than {_PAIRS}")
    return tensors, pairs


def _value(cursor: _Cursor, kind: int, limits: Limits, what: str) -> str:
    """A value as a string: text as it is, everything else as JSON."""
    if kind == STRING:
        return cursor.text(limits.metadata, what)
    if kind in SCALARS:
        return json.dumps(cursor.number(SCALARS[kind], what))
    if kind != _ARRAY:
        raise Malformed(f"{what} is of type {kind}, which GGUF does not have")
    inner, count = cursor.number("<I", what), cursor.number("<Q", what)
    if inner == STRING:
        cursor.strings += count
        if cursor.strings > _STRINGS:
            raise Malformed(f"{what} claims {count} strings, more than {_STRINGS} in all")
        cursor.skip_strings(count, what)
        return f"({count} strings)"
    if inner not in SCALARS:
        raise Malformed(f"{what} is an array of type {inner}, which is not read")
    width = struct.calcsize(SCALARS[inner])
    if count > _SHOWN:
        cursor.skip(width * count, what)
        return f"({count} numbers)"
    return json.dumps([cursor.number(SCALARS[inner], what) for _ in range(count)])


def _alignment(text: str | None) -> int:
    if text is None:
        return ALIGNMENT
    if not text.isascii() or not text.isdigit() or not 0 < int(text) <= _CHUNK or int(text) & (int(text) - 1):
        raise Malformed(f"general.alignment is {show(text)}, not a power of two")
    return int(text)


def _tensor(cursor: _Cursor, limits: Limits, alignment: int) -> tuple[str, TensorInfo]:
    name = cursor.text(4 * limits.name, "a tensor's name")
    what = f"tensor {show(name)}"
    if fault := name_fault(name, limits):
        raise Malformed(f"the tensor name {show(name)} {fault}")
    count = cursor.number("<I", what)
    if count > DIMS:
        raise Malformed(f"{what} claims {count} dimensions, more than {DIMS}")
    shape = tuple(reversed([cursor.number("<Q", what) for _ in range(count)]))
    kind, start = cursor.number("<I", what), cursor.number("<Q", what)
    if prod(each for each in shape if each) >= 1 << 60:
        raise Malformed(f"{what} has a shape too large to count: {list(shape)}")
    if start % alignment:
        raise Malformed(f"{what} begins at byte {start}, which is no multiple of {alignment}")
    if kind in PLAIN:
        dtype = PLAIN[kind]
        return name, TensorInfo(dtype, shape, start, start + WIDTH[dtype] * prod(shape))
    if kind not in QUANTISED:
        raise Malformed(f"{what} is of ggml type {kind}, which is not known here", "lorahub may be older than the file")
    dtype, block, width = QUANTISED[kind]
    if not shape or shape[-1] % block:
        raise Malformed(f"{what} is {dtype}, and its rows of {shape[-1:]} are no whole blocks of {block}")
    return name, TensorInfo(dtype, shape, start, start + prod(shape) // block * width)


def _laid_out(infos: Mapping[str, TensorInfo], available: int, alignment: int) -> dict[str, TensorInfo]:
    """The tensors in the order of their bytes: nothing overlaps, and nothing but padding lies between or behind."""
    ordered = dict(sorted(infos.items(), key=lambda item: (item[1].start, item[1].stop)))
    end, previous = 0, "the header"
    for name, info in ordered.items():
        if info.start != padded(end, alignment):
            what = "overlaps" if info.start < end else "leaves a hole after"
            raise Malformed(f"tensor {show(name)}, from byte {info.start} on, {what} {previous}, which ends at {end}")
        end, previous = info.stop, show(name)
    if end > max(available, 0):
        raise Malformed(f"the file is cut off: {end - max(available, 0)} of {end} bytes of data are missing")
    if available >= padded(end, alignment) + alignment:
        raise Malformed(f"{available - end} bytes follow the last tensor and belong to none")
    return ordered


def padded(at: int, alignment: int) -> int:
    """The first multiple of ``alignment`` from ``at`` on."""
    return at + -at % alignment


def package(what: str) -> Any:
    """The ``gguf`` package, for what only its tables know.

    Raises:
        MissingDependency: it is not installed.
    """
    try:
        return import_module("gguf")
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        raise MissingDependency(
            f"the gguf package is needed to {what}, and is not installed", "pip install 'lorahub-core[gguf]'"
        ) from None


def dequantise(info: TensorInfo, raw: bytes, what: str) -> torch.Tensor:
    """A quantised tensor as float32, for types where that is exact.

    Raises:
        UnsupportedFormat: the type is none of ``EXACT``.
        MissingDependency: the gguf package is not installed.
    """
    if info.dtype not in EXACT:
        raise UnsupportedFormat(
            f"{what} is stored as {info.dtype}, whose values float32 cannot hold exactly",
            "convert the adapter it was made from again: convert_lora_to_gguf.py --outtype f16",
        )
    gguf, numpy = package(f"unpack {info.dtype}"), import_module("numpy")
    _, block, width = next(each for each in QUANTISED.values() if each[0] == info.dtype)
    rows = numpy.frombuffer(raw, dtype=numpy.uint8).reshape(*info.shape[:-1], info.shape[-1] // block * width)
    values = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[info.dtype])
    return torch.from_numpy(numpy.ascontiguousarray(values, dtype=numpy.float32)).reshape(info.shape)
