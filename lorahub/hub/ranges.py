"""Parts of pinned files: which requests bring them, and where they are kept for the next time.

Parts that lie close together come in one request.  What came is kept under the content's hash, which a pin states, so
that the same part of the same content is never asked for twice.  A file that came whole is verified; a part cannot be.
Knows no hub and no adapters.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Self, TypeAlias

from lorahub.errors import DigestMismatch, LorahubError, Unavailable
from lorahub.files.atomic import atomic_write
from lorahub.hub.hub import FilePin, Span, Taken
from lorahub.names import printable

__all__ = ["MOST", "Kept", "coalesce", "cut", "verify_whole"]

GAP = 16 << 10
"""Bytes between two parts that are rather read along than asked around: about what a request costs."""

_WASTE = 8
"""What is read along in all is at most one in so many bytes of the file: parts are asked for, not the whole."""

MOST = 4096
"""Requests for one file; beyond that, pulling it is cheaper for everybody."""

_Piece: TypeAlias = "tuple[int, bytes]"


def coalesce(spans: Iterable[Span], size: int) -> list[Span]:
    """Few spans that hold all of ``spans``, sorted: the smallest gaps are read along, as far as that is worth it.

    Args:
        spans: in any order; they may overlap.
        size: bytes of the whole file.

    Raises:
        Unavailable: there are more than ``MOST``.
    """
    apart = _joined(sorted(span for span in set(spans) if span[1]), set())
    gaps = [(after[0] - sum(before), at) for at, (before, after) in enumerate(pairwise(apart))]
    left, closed = size // _WASTE, set[int]()
    for gap, at in sorted(gaps):
        if gap > min(GAP, left):
            break
        left -= gap
        closed.add(at)
    found = _joined(apart, closed)
    if len(found) > MOST:
        raise Unavailable(
            f"{len(found):,} parts all over the file would have to be asked for one by one", "lorahub pull NS/NAME"
        )
    return found


def _joined(spans: Sequence[Span], closed: Collection[int]) -> list[Span]:
    """Sorted spans, those that touch or overlap as one, and those whose gap to the next is closed."""
    found: list[Span] = []
    for at, (offset, length) in enumerate(spans):
        start, count = found[-1] if found else (0, 0)
        if found and (offset <= start + count or at - 1 in closed):
            found[-1] = (start, max(count, offset + length - start))
        else:
            found.append((offset, length))
    return found


def cut(pieces: Sequence[_Piece], span: Span) -> bytes | None:
    """The bytes of ``span`` where one of the pieces, (offset, bytes), holds them all."""
    offset, length = span
    if not length:
        return b""
    for start, data in pieces:
        if start <= offset and offset + length <= start + len(data):
            return data[offset - start : offset - start + length]
    return None


def verify_whole(file: FilePin, data: bytes, what: str) -> None:
    """Hold a file that came whole against its hash.

    Raises:
        DigestMismatch: it is another content.
    """
    sha256 = hashlib.sha256(data).hexdigest()
    git = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    if not FilePin(size=len(data), sha256=sha256, git=git).agrees(file):
        raise DigestMismatch(
            f"{printable(what)} did not arrive as it was listed: its content differs from the recorded hash",
            "Try again later; if it stays so, the hub or something on the way alters files.",
        )


@dataclass(slots=True)
class Kept:
    """The parts of one content that are on this machine, in one file of the cache."""

    place: Path
    pieces: list[_Piece]

    @classmethod
    def of(cls, root: Path, file: FilePin) -> Self:
        """What is kept of a file below ``root``; nothing where that cannot be read."""
        place = root / "ranges" / f"{file.sha256 or file.git}"
        with suppress(OSError, ValueError, TypeError):
            index, _, data = place.read_bytes().partition(b"\n")
            pieces, at = [], 0
            for offset, length in json.loads(index):
                pieces.append((int(offset), data[at : at + int(length)]))
                at += int(length)
            if at == len(data) and all(0 <= start <= start + len(part) <= file.size for start, part in pieces):
                return cls(place, pieces)
        return cls(place, [])

    def add(self, pieces: Iterable[_Piece]) -> None:
        """Keep more, also for the next process where the cache can be written."""
        self.pieces += pieces
        index = json.dumps([[offset, len(data)] for offset, data in self.pieces]).encode()
        with suppress(OSError, LorahubError):  # a cache that cannot be written asks again next time
            self.place.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(self.place, b"\n".join([index, b"".join(data for _, data in self.pieces)]))

    def drop(self) -> None:
        """Keep nothing any more."""
        self.pieces = []
        with suppress(OSError):  # not there, or a cache that cannot be written
            self.place.unlink()

    def take(self, spans: Sequence[Span], asked: Sequence[Span]) -> Taken:
        """``spans`` out of what is kept by now; ``asked`` is what had to be asked for."""
        parts = [cut(self.pieces, span) for span in spans]
        assert None not in parts
        return Taken(
            parts=tuple(part for part in parts if part is not None),
            nbytes=sum(length for _, length in asked),
            requests=len(asked),
        )
