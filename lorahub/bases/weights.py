"""The digest of a base's weights: the same bytes, wherever they lie.  Hashed once; remembered by path, size and time.

``sha256:`` over a line ``sha256 size path`` for each weights file, sorted by path, so that a hub which lists the hashes
of its files gives the same digest without a download.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from lorahub.bases.framework import BaseFiles
from lorahub.errors import IntegrityError, LorahubError
from lorahub.files.atomic import atomic_write
from lorahub.files.raw import CHUNK, open_regular, read_into
from lorahub.files.user import cache_root

__all__ = ["weights_digest"]

_SETTLED = 2_000_000_000  # ns; a file changed later than this may change again without its time stamp showing it


def weights_digest(files: BaseFiles, *, progress: Callable[[int, int], None] | None = None) -> str:
    """``sha256:`` over the weights files; reads them all the first time.

    Args:
        files: the surveyed base.
        progress: called with (bytes done, bytes in all).

    Raises:
        NotFound, AccessDenied, Unavailable: a file cannot be read.
        IntegrityError: a file is not the one that was surveyed, or changes meanwhile.
    """
    total, done = sum(header.size for header in files.headers.values()), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, total)

    lines = []
    for name in sorted(files.headers, key=str.encode):
        size = files.headers[name].size
        lines.append(f"{_file_sha256(files.folder / name, size, advance)} {size} {name}\n")
    return f"sha256:{hashlib.sha256(''.join(lines).encode()).hexdigest()}"


def _file_sha256(path: Path, size: int, advance: Callable[[int], None]) -> str:
    """The sha256 of a file, from the cache where its path, size, time and inode are known."""
    with open_regular(path) as file:
        before = os.fstat(file.fileno())
        if before.st_size != size:
            raise IntegrityError(f"{path} has {before.st_size} bytes and had {size} when its header was read")
        key = json.dumps([str(path.resolve()), size, before.st_mtime_ns, before.st_ino, before.st_dev])
        entry = cache_root() / "digests" / hashlib.sha256(key.encode()).hexdigest()
        if known := _recall(entry):
            advance(size)
            return known
        sha, buffer = hashlib.sha256(), memoryview(bytearray(min(CHUNK, size)))
        for start in range(0, size, CHUNK):
            part = buffer[: size - start]
            read_into(file, start, part)
            sha.update(part)
            advance(len(part))
        after = os.fstat(file.fileno())
    if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        raise IntegrityError(f"{path} changed while it was hashed", "wait until it is written, then try again")
    if time.time_ns() - after.st_mtime_ns > _SETTLED:
        _remember(entry, sha.hexdigest())
    return sha.hexdigest()


def _recall(entry: Path) -> str:
    try:
        text = entry.read_text(encoding="ascii").strip()
    except (OSError, ValueError):  # not there, or not ours: hash again
        return ""
    return text if len(text) == hashlib.sha256().digest_size * 2 else ""


def _remember(entry: Path, digest: str) -> None:
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(entry, f"{digest}\n".encode())
    except (OSError, LorahubError):  # a cache that cannot be written costs time, nothing else
        return
