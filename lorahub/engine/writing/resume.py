"""Whether a file that an earlier run finished is still what it was.

Its header is compared, every byte that was computed by its checksum, and every byte that was copied with where it came
from.  That costs a part of making it again, and spares taking over what is damaged.  Knows files; no tensors.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lorahub.engine.writing.checkpoint import Shard
from lorahub.engine.writing.flow import Note
from lorahub.errors import LorahubError
from lorahub.files.raw import CHUNK, open_regular, read_into
from lorahub.files.tensors import FileSource
from lorahub.files.writer import encode_header

__all__ = ["whole"]


def whole(
    shards: Sequence[Shard], notes: Mapping[str, Note], folder: Path, sources: Mapping[str, FileSource]
) -> set[str]:
    """The names of those shards whose files in ``folder`` hold what they should.

    Args:
        shards: which are said to be finished.
        notes: name -> what was noted of it, with the ``sums`` of its writer.
        folder: where they lie.
        sources: the base's weights files.
    """
    return {shard.name for shard in shards if _whole(shard, notes[shard.name], folder / shard.name, sources)}


def _whole(shard: Shard, note: Note, path: Path, sources: Mapping[str, FileSource]) -> bool:
    try:
        with FileSource(path, prefix=shard.prefix) as made:
            return (
                _begins_with(path, encode_header(shard.entries, shard.metadata, prefix=shard.prefix))
                and all(_crc(path, at, nbytes) == expected for at, nbytes, expected in note["sums"])
                and all(
                    bytes(a) == bytes(b)  # views compare byte by byte, many times slower
                    for saved, copy in shard.copies.items()
                    for a, b in zip(made.chunks(saved), sources[copy.file].chunks(copy.name), strict=True)
                )
            )
    except LorahubError:  # whatever is wrong with it, it is made again
        return False


def _begins_with(path: Path, expected: bytes) -> bool:
    found = bytearray(len(expected))
    with open_regular(path) as file:
        read_into(file, 0, found)
    return found == expected


def _crc(path: Path, offset: int, nbytes: int) -> int:
    value = 0
    for part in _parts(path, offset, nbytes):
        value = zlib.crc32(part, value)
    return value


def _parts(path: Path, offset: int, nbytes: int) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(min(CHUNK, nbytes)))
    with open_regular(path) as file:
        for start in range(0, nbytes, CHUNK):
            part = buffer[: nbytes - start]
            read_into(file, offset + start, part)
            yield part
