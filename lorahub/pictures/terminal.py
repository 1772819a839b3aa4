"""A heat map as lines of text: coloured cells where the terminal has 256 colours, blocks of eight heights elsewhere.

Fits the width it is given: columns are told by their names where these fit, else by letters that are explained below,
and come in several tables where there are too many.
"""

from __future__ import annotations

import math
import string
from collections.abc import Sequence

from lorahub.pictures.colours import STEPS_256, at_256, from_256, ink_on
from lorahub.pictures.heat_map import HeatMap
from lorahub.pictures.scale import Scale, label, number, shortened

__all__ = ["keys", "lines"]

_BLOCKS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
_PLAIN = ".:-=+*#@"
"""The same in ASCII."""

_EMPTY = " "
_NARROW, _WIDE = 3, 14
"""Characters of a cell."""


def lines(picture: HeatMap, *, width: int, colour: bool, unicode: bool = True) -> list[str]:
    """The picture in lines of at most ``width`` characters (escapes for colour not counted).

    Args:
        picture: what to show.
        width: of the terminal, 20 or more.
        colour: whether it takes 256 colours.
        unicode: whether it takes blocks; else characters of ASCII.
    """
    width = max(width, 20)
    rows = [shortened(_ascii(label(row), unicode), max(width // 2 - 4, 8)) for row in picture.rows]
    margin = max(map(len, rows), default=0) + 2
    names = [_ascii(label(column), unicode) for column in picture.columns]
    short = [name.rpartition(".")[2] if picture.dotted else name for name in names]
    heads = names if len(set(short)) < len(short) or any(name.isdecimal() for name in short) else short
    longest, room = max(map(len, heads), default=1), width - margin
    least = 6 if picture.scale.low >= 0 else 9
    cell = min(max(longest + 1, least), _WIDE + 1, max(room // max(len(names), 1), _NARROW + 1))
    keyed = longest > cell - 1
    heads = keys(len(names)) if keyed else heads
    scale = picture.scale
    result = [_fit(picture.title, width, unicode)]
    if picture.subtitle:
        result.append(_fit(picture.subtitle, width, unicode))
    across = max(room // cell, 1)
    for start in range(0, len(names), across):
        some = range(start, min(start + across, len(names)))
        result += ["", " " * margin + "".join(heads[column].ljust(cell) for column in some).rstrip()]
        for row, name in zip(picture.rows, rows, strict=True):
            cells = [
                _cell(picture.values.get((row, picture.columns[column])), scale, cell, colour, unicode)
                for column in some
            ]
            result.append((name.ljust(margin) + "".join(cells)).rstrip(" "))
    result += ["", *_legend(picture, scale, width, colour, unicode)]
    if keyed:
        result += _explained(heads, names, width)
    return result if unicode else [line.replace("\u2026", "~") for line in result]


def _cell(value: float | None, scale: Scale, cell: int, colour: bool, unicode: bool) -> str:
    if value is None or math.isnan(value):
        return _EMPTY * cell
    room = cell - 1
    if colour:
        shade = at_256(scale.share(value))
        ink = 231 if ink_on(from_256(shade)) == "#ffffff" else 16
        return f"\x1b[48;5;{shade};38;5;{ink}m{_written(value, room).center(room)}\x1b[0m "
    text = _written(value, room - 2)
    blocks = _BLOCKS if unicode else _PLAIN
    block = blocks[min(int(scale.share(value) * len(blocks)), len(blocks) - 1)]
    return (f"{block} {text}" if text else block * room).ljust(cell)


def _written(value: float, room: int) -> str:
    """The number as exactly as it fits, or nothing."""
    forms = (number(value), number(value, 1), number(value, 1).replace("0.", ".", 1))
    return next((text for text in forms if len(text) <= room), "")


def _legend(picture: HeatMap, scale: Scale, width: int, colour: bool, unicode: bool) -> list[str]:
    measure = _ascii(label(f"{picture.measure}, log scale" if scale.logarithmic else picture.measure), unicode)
    low, high = number(scale.low), number(scale.high)
    shades = STEPS_256[:: 1 if width >= 40 else 2]
    blocks = _BLOCKS if unicode else _PLAIN
    bar = "".join(f"\x1b[48;5;{shade}m \x1b[0m" for shade in shades) if colour else blocks
    room = width - len(shades if colour else blocks) - len(low) - len(high) - 4
    said = f"{low} {bar} {high}"
    return [f"{said}  {measure}"] if len(measure) <= room else [said, _fit(measure, width, unicode)]


def _explained(heads: Sequence[str], names: Sequence[str], width: int) -> list[str]:
    """What the letters stand for, several to a line."""
    pairs = [f"{head} {shortened(name, width - len(head) - 1)}" for head, name in zip(heads, names, strict=True)]
    found = [""]
    for pair in pairs:
        joined = f"{found[-1]}   {pair}" if found[-1] else pair
        if len(joined) <= width:
            found[-1] = joined
        else:
            found.append(pair)
    return found


def keys(count: int) -> list[str]:
    """a, b, ..., z, aa, ab, ..."""
    letters = string.ascii_lowercase
    return [letters[each] if each < 26 else letters[each // 26 - 1] + letters[each % 26] for each in range(count)]


def _fit(text: str, width: int, unicode: bool) -> str:
    return shortened(_ascii(label(text), unicode), width)


def _ascii(text: str, unicode: bool) -> str:
    return text if unicode else text.encode("ascii", "replace").decode()
