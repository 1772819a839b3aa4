"""Read safetensors headers: without torch, under limits, from a file or from anything that reads ranges.

Whatever the bytes are, the outcome is a ``Header`` in which every tensor lies where it says, or one ``HeaderError``.
Reads the header alone, never a tensor.  Knows nothing of adapters.

The format: 8 bytes of header length (little-endian), that many bytes of JSON, then the tensors' bytes without holes.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any, TypeAlias

from lorahub.errors import HeaderError
from lorahub.files.entries import METADATA, Form, Limits, TensorInfo, Tensors, form_of, name_fault, sizes
from lorahub.files.grammar import INTEGERS_ONLY, Malformed, Scanner, show
from lorahub.files.raw import open_regular, read_bytes
from lorahub.files.tiles import Known, tiled

__all__ = [
    "METADATA",
    "Header",
    "Known",
    "Limits",
    "Read",
    "TensorInfo",
    "header_of",
    "name_fault",
    "parse_header",
    "prefixed",
    "read_header",
]

Read: TypeAlias = Callable[[int, int], bytes]
"""``read(offset, length)``: exactly those bytes."""

_PADDING = 16
_PREFETCH = 64 << 10  # most headers of adapters fit: one request where ranges are read remotely
_LEAD = f'{{"{METADATA}":'
_ENTRY = 4096  # characters; a real entry takes about a hundred
_AT_ONCE = 1 << 18  # characters of metadata; what is decoded for nothing, because it is more or other, stays small
_FIELDS = {"dtype", "shape", "data_offsets"}
_FETCH_AGAIN = "the file is damaged or was not written as safetensors: fetch it again, or ask its author"
_NO_PICKLE = "pickles are never opened: ask for safetensors"

# What else turns up under the name .safetensors.
_IMPOSTORS: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "this is a Git LFS pointer, not the file itself", "git lfs pull"),
    (b"PK\x03\x04", "this is a zip archive, probably a PyTorch pickle", _NO_PICKLE),
    (b"\x80\x04\x95", "this is a Python pickle", _NO_PICKLE),
    (b"\x80", "this looks like a Python pickle", _NO_PICKLE),
    (b"GGUF", "this is a GGUF file", "give it the name that says so: NAME.gguf"),
    (b"<", "this is a web page or XML, not weights", "the download went to an error or login page: fetch it again"),
    (b"{", "this is JSON without the length in front", "it may be an index or an error message: look inside"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a safetensors file says of itself, proven consistent.

    Attributes:
        tensors: name -> info, in the order of their bytes.
        metadata: the free-form strings under ``__metadata__``.
        data_start: where the data section begins, in bytes from the start of the file.
        size: bytes of the whole file.
    """

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    data_start: int
    size: int

    def span(self, name: str) -> tuple[int, int]:
        """(offset from the start of the file, bytes) of a tensor."""
        info = self.tensors[name]
        return self.data_start + info.start, info.nbytes


def prefixed(header: Header, prefix: str) -> Header:
    """The header with every tensor's name behind ``prefix``, for files whose tensors have like names elsewhere."""
    if not prefix:
        return header
    tensors = MappingProxyType({f"{prefix}{name}": info for name, info in header.tensors.items()})
    return replace(header, tensors=tensors)


def read_header(path: str | os.PathLike[str], limits: Limits | None = None, known: Known | None = None) -> Header:
    """The header of a local file; links are followed.

    ``known`` is as for ``parse_header``.

    Raises:
        HeaderError: the file is no well-formed safetensors file, or is over the limits.
        NotFound: there is no regular file.
        AccessDenied: it may not be read.
    """
    with open_regular(path) as file:
        return header_of(file, limits, known)


def header_of(file: io.FileIO, limits: Limits | None = None, known: Known | None = None) -> Header:
    """The header of an open file, which stays open.

    Raises:
        HeaderError: as ``read_header``.
    """
    size = os.fstat(file.fileno()).st_size
    return parse_header(partial(read_bytes, file), size, where=str(file.name), limits=limits, known=known)


def parse_header(
    read: Read, size: int, *, where: str, limits: Limits | None = None, known: Known | None = None
) -> Header:
    """The header of anything that can be read in ranges: one read, or two where it is longer than 64 KiB.

    Args:
        read: gives exactly the bytes asked for; its own errors pass through.
        size: bytes of the whole file.
        where: what to call it in messages.
        limits: how much the header may ask for.
        known: where many files are read, one of these for all of them, empty at first: those of one trainer differ in
            their metadata alone, and text that was found sound once is not scanned again.

    Raises:
        HeaderError: the content is not well-formed, or is over the limits; nothing else, whatever the bytes.
    """
    try:
        return _parse(read, size, limits or Limits(), known)
    except Malformed as fault:
        raise HeaderError(f"{where}: {fault.reason}", fault.hint or _FETCH_AGAIN) from None


def _parse(read: Read, size: int, limits: Limits, known: Known | None) -> Header:
    if size == 0:
        raise Malformed("the file is empty (0 bytes)", "an interrupted download leaves such a file: fetch it again")
    first = _exactly(read, 0, min(size, _PREFETCH))
    length = int.from_bytes(first[:8], "little")
    if size < 8 or length > min(size - 8, limits.header):
        raise _bad_length(first, size, length, limits)
    raw = memoryview(first)[8 : 8 + length]
    if len(raw) < length:
        raw = memoryview(b"".join((raw, _exactly(read, 8 + len(raw), length - len(raw)))))
    if bytes(raw[:1]) != b"{":
        raise Malformed("the header does not begin with '{'")
    try:
        text = str(raw, "utf-8")
    except UnicodeDecodeError as error:
        raise Malformed(f"the header is not UTF-8 (byte {8 + error.start})") from None
    tensors, metadata = _sound(text, limits, Known(limits) if known is None else known)
    _demand_filled(tensors.end, size - 8 - length)
    return Header(
        tensors=tensors,
        metadata=MappingProxyType(metadata),
        data_start=8 + length,
        size=size,
    )


def _sound(text: str, limits: Limits, known: Known) -> tuple[Tensors, dict[str, str]]:
    """Tensors and metadata; where the metadata lead, as nearly all writers put them, text known already is not read."""
    if known.limits != limits:
        known = Known(limits)
    scanner, metadata = Scanner(text), {}
    if text.startswith(_LEAD):
        scanner.at = len(_LEAD)
        metadata = _metadata(scanner, limits)
        rest = text[scanner.at : _unpadded(text)]
    else:
        rest = f",{text[1 : _unpadded(text)]}"
    tensors = known.met(rest)
    if tensors is None:
        tensors = tiled(rest, limits, known)
        if tensors is None:
            listed, found = _walk(Scanner(text), limits)
            tensors = _contiguous(listed)
            if found != metadata:  # they come later, so that the rest is not tensors alone
                return tensors, found
        if tensors:  # an empty header reads as one whose metadata a comma too many follows
            known.keep(rest, tensors)
    return tensors, metadata


def _unpadded(text: str) -> int:
    """Where the blanks begin that fill a header up, as many as the metadata leave over; seldom more than seven."""
    end = text[-_PADDING:]
    short = end.rstrip(" ")
    return len(text) - len(end) + len(short) if short else len(text.rstrip(" "))


def _exactly(read: Read, offset: int, length: int) -> bytes:
    if not length:
        return b""
    data = read(offset, length)
    if len(data) != length:
        raise Malformed(f"{length} bytes were asked for at {offset} and {len(data)} came")
    return data


def _bad_length(first: bytes, size: int, length: int, limits: Limits) -> Malformed:
    for magic, what, hint in _IMPOSTORS:
        # One letter may also begin the length of a file that was cut off; four more make a header of over 4 GiB.
        if first.startswith(magic) and (len(magic) > 1 or any(first[4:8])):
            return Malformed(what, hint)
    if size < 8:
        return Malformed(f"the file has {size} bytes, too few for any safetensors file")
    if length > size - 8:
        return Malformed(f"the header claims {length} bytes and {size - 8} follow: cut off, or not safetensors")
    return Malformed(
        f"the header takes {length} bytes, over the limit of {limits.header}",
        "if you trust the file, raise the limit: Limits(header=...)",
    )


def _walk(scanner: Scanner, limits: Limits) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors in the order written, and metadata; each entry sound in itself."""
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for name in scanner.members("the header"):
        if name == METADATA:
            metadata = _metadata(scanner, limits)
            continue
        if fault := name_fault(name, limits):
            raise Malformed(f"the tensor name {show(name)} {fault}")
        if len(tensors) == limits.tensors:
            raise Malformed(
                f"more than {limits.tensors} tensors", "if you trust the file, raise the limit: Limits(tensors=...)"
            )
        what = f"tensor {show(name)}"
        tensors[name] = _entry(scanner.small(what, decoder=INTEGERS_ONLY, limit=_ENTRY), what)
    scanner.end("the header")
    return tensors, metadata


def _metadata(scanner: Scanner, limits: Limits) -> dict[str, str]:
    result: dict[str, str] = {}
    size = 0
    if scanner.null():  # MLX writes it for none
        return result
    if (found := _at_once(scanner, limits)) is not None:
        return found
    for key in scanner.members(METADATA):
        value = scanner.plain()
        if value is None:
            value = scanner.string(f"the value of {show(key)} in {METADATA}")
        size += len(key.encode()) + len(value.encode())
        if size > limits.metadata:
            raise Malformed(
                f"{METADATA} takes more than {limits.metadata} bytes",
                "if you trust the file, raise the limit: Limits(metadata=...)",
            )
        result[key] = value
    return result


def _at_once(scanner: Scanner, limits: Limits) -> dict[str, str] | None:
    """Metadata as nearly all files have them, or None, with nothing read: then one is gone through after another."""
    start = scanner.at
    with suppress(Malformed, UnicodeEncodeError):
        found = scanner.small(METADATA, decoder=INTEGERS_ONLY, limit=_AT_ONCE)
        if isinstance(found, dict) and {str}.issuperset(map(type, found.values())):
            size = len("".join([*found, *found.values()]).encode())
            if size <= limits.metadata:
                return found
    scanner.at = start
    return None


def _entry(value: Any, what: str) -> TensorInfo:
    if not isinstance(value, dict) or value.keys() != _FIELDS:
        found = f"has the fields {show(', '.join(value))}" if isinstance(value, dict) else "is no object"
        raise Malformed(f"{what} {found}; dtype, shape and data_offsets were expected")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    form, bits = form_of(dtype, shape, what)
    if not sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise Malformed(f"{what} has data_offsets that are no [start, stop]: {show(str(offsets))}")
    start, stop = offsets
    if bits != 8 * (stop - start):
        raise Malformed(f"{what} takes {bits / 8:g} bytes as {dtype} {shape}, and its data_offsets span {stop - start}")
    return TensorInfo(*form, start, stop)


def _contiguous(tensors: dict[str, TensorInfo]) -> Tensors:
    """The tensors in the order of their bytes, which follow each other from 0 on."""
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)))
    end, previous = 0, "the start"
    for name, info in ordered.items():
        if info.start != end:
            what = "overlaps" if info.start < end else "leaves a hole after"
            raise Malformed(f"tensor {show(name)}, from byte {info.start} on, {what} {previous}, which ends at {end}")
        end, previous = info.stop, show(name)
    forms: dict[Form, Form] = {}
    for info in ordered.values():
        forms.setdefault(form := Form(info.dtype, info.shape), form)
    return Tensors(
        {name: forms[Form(info.dtype, info.shape)] for name, info in ordered.items()},
        [info.start for info in ordered.values()],
        [info.stop for info in ordered.values()],
    )


def _demand_filled(end: int, available: int) -> None:
    """Make sure that the tensors take all bytes there are."""
    if end > available:
        raise Malformed(f"the file is cut off: {end - available} of {end} bytes of data are missing")
    if end < available:
        raise Malformed(f"{available - end} bytes follow the last tensor and belong to none")
