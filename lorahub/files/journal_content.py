"""What a write-ahead journal says, and how it is written down: which bytes of which files, and their checksums."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorahub.errors import IntegrityError, LorahubError
from lorahub.names import check_path

__all__ = ["JOURNAL", "Content", "Range", "encode", "read_content"]

JOURNAL = "journal.json"
"""The file in a journal's folder that says the rest."""

_VERSION = 1


@dataclass(frozen=True, slots=True)
class Range:
    """Bytes of a file, where they lie in the journal's own files, and checksums of what they become and were."""

    file: str
    offset: int
    nbytes: int
    at: int
    new: int
    old: int


@dataclass(slots=True, kw_only=True)
class Content:
    """What a journal says.

    Attributes:
        ranges: sorted by file and place.
        sizes: file name -> its size, which does not change.
        small: name of a small file -> whether there was one before.
        about: the caller's own.
    """

    ranges: list[Range] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)
    small: dict[str, bool] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)


def encode(content: Content) -> bytes:
    """The content as JSON; ``read_content`` gives it back."""
    ranges = [[each.file, each.offset, each.nbytes, each.at, each.new, each.old] for each in content.ranges]
    body = {"ranges": ranges, "sizes": content.sizes, "small": content.small, "about": dict(content.about)}
    return json.dumps({"version": _VERSION, **body}, sort_keys=True).encode()


def read_content(place: Path) -> Content:
    """A journal from its folder, which may have come from anywhere with it.

    Raises:
        IntegrityError: it is not one of ours, or names what lies outside the folder.
    """
    try:
        body = json.loads((place / JOURNAL).read_bytes())
        if body["version"] != _VERSION:
            body = {}  # another version's names may mean something else
        content = Content(
            ranges=[Range(*entry) for entry in body["ranges"]],
            sizes=dict(body["sizes"]),
            small=dict(body["small"]),
            about=dict(body["about"]),
        )
        folder = place.parent.resolve()
        strange = [
            *(name for name in content.sizes if "/" in check_path(name)),
            *(each.file for each in content.ranges if not _lies_within(each, content.sizes[each.file])),
            *(name for name in content.small if (folder / check_path(name)).parent.resolve() != (folder / name).parent),
        ]
    except (OSError, ValueError, KeyError, TypeError, LorahubError) as error:  # whatever a foreign file can hold
        raise IntegrityError(f"{place} is no journal that can be read: {error}", "fetch the base again") from None
    if strange:
        raise IntegrityError(f"{place} names {strange[0]!r} beyond what lies in its folder", f"look at {place}")
    return content


def _lies_within(each: Range, size: int) -> bool:
    return 0 <= each.offset <= each.offset + each.nbytes <= size and each.at >= 0
