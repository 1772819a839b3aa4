"""The files of a pin, read in parts: whole small ones, and the headers of weights files without the weights.

Knows neither what an adapter nor what a base is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from lorahub.errors import HeaderError, IntegrityError
from lorahub.files.header import Header, Limits, parse_header
from lorahub.hub.hub import Hub, Pin, Span

__all__ = ["Cost", "PinnedFiles"]

_LENGTH = 8
"""Bytes that say how long a header is."""

_MAGIC = 64
"""Bytes that tell what a file is that is no safetensors file."""


@dataclass(slots=True)
class Cost:
    """What was asked of a hub so far: bytes and requests; nothing for what was read before and kept."""

    nbytes: int = 0
    requests: int = 0


@final
@dataclass(frozen=True, slots=True)
class PinnedFiles:
    """The files of a pin; what is read is added to the cost."""

    hub: Hub
    pin: Pin
    cost: Cost

    def parts(self, name: str, *spans: Span) -> tuple[bytes, ...]:
        """Parts of a file, (offset, how many bytes) each.

        Raises:
            NotFound, AccessDenied, Offline, Unavailable, IntegrityError: see ``Hub.read_many``.
        """
        taken = self.hub.read_many(self.pin, name, spans)
        self.cost.nbytes += taken.nbytes
        self.cost.requests += taken.requests
        return taken.parts

    def whole(self, name: str, *, limit: int | None = None) -> bytes:
        """A whole file, verified.

        Raises:
            IntegrityError: it has more bytes than ``limit``, or is not what the pin says.
            NotFound, AccessDenied, Offline, Unavailable: as ``parts``.
        """
        size = self.pin.files[name].size
        if limit is not None and size > limit:
            raise IntegrityError(f"{self.pin}/{name} takes {size:,} bytes, and {limit:,} are the most that are read")
        return self.parts(name, (0, size))[0]

    def header(self, name: str) -> Header:
        """The header of a safetensors file, in two requests and not a byte more than it takes; it is not verified.

        ``parse_header`` reads ahead; what lies behind the header is given to it as zeros, which it does not look at.

        Raises:
            HeaderError: it is malformed.
            NotFound, AccessDenied, Offline, Unavailable, IntegrityError: as ``parts``.
        """
        size = self.pin.files[name].size
        (first,) = self.parts(name, (0, min(_LENGTH, size)))
        length = int.from_bytes(first, "little")
        if size < _LENGTH or length > min(size - _LENGTH, Limits().header):  # no header: what is it then?
            (start,) = self.parts(name, (0, min(_MAGIC, size)))
        else:
            (text,) = self.parts(name, (_LENGTH, length))
            start = first + text

        def read(offset: int, count: int) -> bytes:
            return start[offset : offset + count].ljust(count, b"\0")

        try:
            return parse_header(read, size, where=f"{self.pin}/{name}")
        except HeaderError:  # parts come unverified: what was wrong on the way shall not stay wrong
            self.hub.forget(self.pin, name)
            raise
