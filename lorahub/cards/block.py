"""The part of a README that is ours: between two comments, written anew each time, and nothing else with it.

The opening comment keeps what was written: which metadata are ours, and a digest of the text, so that what a person has
changed since is noticed and never overwritten.  Knows no adapter.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from lorahub import strict_json
from lorahub.cards.front import FILE
from lorahub.errors import RecordError

__all__ = ["Written", "around", "digest", "place", "take"]

_LIMIT = 1 << 16
"""Bytes of the note in the opening comment."""

_ANY = re.compile(r"(?:\A|(?<=[\r\n]))[ \t]*<!--[ \t]*lorahub:[^\r\n]*")
_BEGIN = re.compile(r"[ \t]*<!-- lorahub: begin(?: (\{.*\}))? -->[ \t]*")
_END = re.compile(r"[ \t]*<!-- lorahub: end -->[ \t]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What an earlier card wrote.

    Attributes:
        keys: metadata key -> digest of the value that was written.
        items: metadata key -> what was added to its list.
        author: a digest of the author's part as it was then, or "".
    """

    keys: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    items: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))
    author: str = ""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the block lies in a body: from ``start`` to ``end``, both lines included."""

    start: int
    end: int


def digest(value: Any) -> str:
    """Twelve hex digits that tell one value of metadata from another."""
    text = strict_json.compact({"value": _jsonable(value)})
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def _jsonable(value: Any) -> Any:
    """A YAML value as JSON has it: dates and the like as their text."""
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_jsonable(item) for item in value]
    return value if isinstance(value, str | int | bool | None) else repr(value)


def take(body: str, lines_before: int = 0) -> tuple[_Place | None, Written]:
    """Where our part lies in a body, and what it says was written; None where there is none yet.

    Args:
        body: of the README.
        lines_before: how many lines come before it, for messages.

    Raises:
        RecordError: the comments are not one pair, or what is between them was changed by hand.
    """
    marks = [(found, _BEGIN.fullmatch(found[0]), _END.fullmatch(found[0])) for found in _ANY.finditer(body)]
    if not marks:
        return None, Written()
    if len(marks) != 2 or not marks[0][1] or not marks[1][2]:
        lines = [str(lines_before + _line(body, found.start())) for found, _, _ in marks]
        raise RecordError(
            f"{FILE}: the comments that enclose lorahub's part are not one beginning and one end (line "
            f"{', '.join(lines[:8])})",
            "leave one <!-- lorahub: begin --> and one <!-- lorahub: end --> below it, each on a line of its own, with "
            "nothing between them; or remove all of them",
        )
    (first, begin, _), (last, _, _) = marks
    assert begin is not None  # tested above
    note = _note(begin[1])
    inner = body[first.end() : last.start()]
    if inner.strip() and note.get("text") != _text_digest(inner):
        raise RecordError(
            f"{FILE}, from line {lines_before + _line(body, first.start())} on: lorahub's part was changed by hand, "
            "and writing it anew would lose that",
            "move what you wrote out of it, and delete the rest between the two comments: it is written anew",
        )
    return _Place(first.start(), last.end()), _written(note)


def place(body: str, where: _Place | None, text: str, written: Written, newline: str) -> str:
    """The body with our part in its place, or at the end where it has none; the rest stays byte for byte.

    Args:
        body: of the README.
        where: as ``take`` found it.
        text: our part, its lines ending in a line feed.
        written: for the next time.
        newline: how the README's lines end.
    """
    inner = f"\n{text.strip()}\n"
    note: dict[str, Any] = {"text": _text_digest(inner)}
    note |= {"author": written.author} if written.author else {}
    note |= {"keys": dict(sorted(written.keys.items()))} if written.keys else {}
    note |= {"items": {key: list(items) for key, items in sorted(written.items.items())}} if written.items else {}
    spelled = strict_json.compact(note).replace("-", "\\u002d").replace(">", "\\u003e")  # a comment ends at the first
    block = f"<!-- lorahub: begin {spelled} -->\n{inner}\n<!-- lorahub: end -->".replace("\n", newline)
    if where is not None:
        return body[: where.start] + block + body[where.end :]
    if not body:
        return block + newline
    gap = newline if body.endswith(("\n", "\r")) else newline * 2
    return f"{body}{gap}{block}{newline}"


def around(body: str, where: _Place | None) -> str:
    """The body without our part."""
    return body if where is None else f"{body[: where.start]}\n{body[where.end :]}"


def _line(text: str, at: int) -> int:
    return len(re.findall(r"\r\n|\r|\n", text[:at])) + 1


def _text_digest(inner: str) -> str:
    """Of the text as editors leave it alone: without line ends' spelling and space at the end of lines."""
    lines = [line.rstrip() for line in inner.strip().splitlines()]
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()[:12]


def _note(text: str | None) -> dict[str, Any]:
    """What the opening comment keeps; nothing where it cannot be read, and then the metadata count as the author's."""
    try:
        found = strict_json.read(text or "{}", limit=_LIMIT)
    except strict_json.NotStrict:
        return {}
    return found if isinstance(found, dict) else {}


def _written(note: Mapping[str, Any]) -> Written:
    keys, items, author = note.get("keys"), note.get("items"), note.get("author")
    return Written(
        author=author if isinstance(author, str) else "",
        keys={key: value for key, value in keys.items() if isinstance(value, str)} if isinstance(keys, dict) else {},
        items={
            key: tuple(item for item in values if isinstance(item, str))
            for key, values in (items.items() if isinstance(items, dict) else ())
            if isinstance(values, list)
        },
    )
