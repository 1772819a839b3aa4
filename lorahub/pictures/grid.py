"""Dotted names as a grid: which repeated block (a row), and which place in it (a column).

A number in a name counts blocks where the same places occur under several numbers: the 3 in ``layers.3.attn.q`` does,
the 0 in ``to_out.0`` does not.  Rows end behind the last such number.  Names may use underscores for dots.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Place", "arrange"]

_WHOLE = "(whole)"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a name stands in the grid."""

    row: str
    column: str


def arrange(names: Sequence[str]) -> dict[str, Place]:
    """Name -> its row and column; names of no repeated block share a row, and no two names a place.

    Columns are as short as they can be and still differ; what all rows begin with is left out.
    """
    parts = {name: _parts(name) for name in dict.fromkeys(names)}
    splits = _splits(parts)
    rows = {name: parts[name][: splits[name]] for name in parts}
    columns = {name: parts[name][splits[name] :] for name in parts}
    shown_rows, shown_columns = _trimmed_rows(set(rows.values())), _trimmed_columns(set(columns.values()))
    places = {name: Place(shown_rows[rows[name]], shown_columns[columns[name]]) for name in parts}
    if len(set(places.values())) < len(places):  # two names came to one place: each column in full then
        places = {name: Place(shown_rows[rows[name]], _joined(columns[name]) or name) for name in parts}
    return places


_Parts = tuple[str, ...]


def _parts(name: str) -> _Parts:
    """Words and numbers; words that no number divides stay together where underscores stand for dots."""
    found: list[str] = []
    for part in name.split("."):
        if _DIVIDED.search(part) or "." not in name:
            found += [piece.strip("_") for piece in _NUMBER.split(part)]
        else:
            found.append(part)
    return tuple(filter(None, found))


_NUMBER = re.compile(r"(?<=_)(\d+)(?=_|$)")
_DIVIDED = re.compile(r"_\d+_")


def _splits(parts: Mapping[str, _Parts]) -> dict[str, int]:
    """Name -> how many of its parts make the row."""
    below: dict[tuple[_Parts, str], set[_Parts]] = {}
    for each in parts.values():
        for at, part in enumerate(each):
            if part.isdecimal():
                below.setdefault((_shape(each[:at]), part), set()).add(_shape(each[at + 1 :]))
    counts: dict[tuple[_Parts, _Parts], int] = {}
    for (before, _), places in below.items():
        for place in places:
            counts[before, place] = counts.get((before, place), 0) + 1
    repeated = {before for (before, place), count in counts.items() if count > 1 and place}
    shared = {_after_numbers(place) for (_, place), count in counts.items() if count > 1} - {()}
    return {name: _split(each, repeated, shared) for name, each in parts.items()}


def _split(parts: _Parts, repeated: set[_Parts], shared: set[_Parts]) -> int:
    """Behind the last number that counts, or else, in a block that is alone, behind one before a place others have."""
    numbers = [at for at, part in enumerate(parts) if part.isdecimal()]
    counting = [at for at in numbers if _shape(parts[:at]) in repeated]
    alone = [at for at in numbers if _shape(parts[at + 1 :]) in shared]  # the block in the middle of a UNet
    split = max([at + 1 for at in counting] + [at + 1 for at in alone], default=0)
    while 0 < split < len(parts) - 1 and parts[split].isdecimal():
        split += 1
    return split


def _after_numbers(parts: _Parts) -> _Parts:
    start = next((at for at, part in enumerate(parts) if part != "#"), len(parts))
    return parts[start:]


def _shape(parts: _Parts) -> _Parts:
    return tuple("#" if part.isdecimal() else part for part in parts)


def _trimmed_rows(rows: set[_Parts]) -> dict[_Parts, str]:
    """Row -> label, without what all of them begin with; the word before a number stays."""
    named = [row for row in rows if row]
    common = 0
    while named and all(len(row) > common + 2 for row in named) and len({row[common] for row in named}) == 1:
        if any(row[common + 1].isdecimal() for row in named):
            break
        common += 1
    return {row: _joined(row[common:]) if row else _WHOLE for row in rows}


def _trimmed_columns(columns: set[_Parts]) -> dict[_Parts, str]:
    """Column -> the shortest end that begins with a word, says enough, and is no other column's end."""
    result = {}
    for column in columns:
        for start in range(len(column) - 1, -1, -1):
            tail = column[start:]
            others = [other for other in columns if other != column and other[-len(tail) :] == tail]
            if start == 0 or (not column[start].isdecimal() and _says_enough(tail) and not others):
                result[column] = _joined(tail)
                break
        else:
            result[column] = _WHOLE
    return result


def _says_enough(parts: _Parts) -> bool:
    """Whether a column is known by this end: by two words, or by one of three ("attn1_to_q", "net_2")."""
    words = [part for part in parts if not part.isdecimal()]
    return len(words) > 1 or "_".join(parts).count("_") > 1


def _joined(parts: _Parts) -> str:
    return ".".join(parts)
